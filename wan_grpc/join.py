"""What torchrun starts on another host: `-m wan_grpc.join --address HOST:PORT` is `wan-grpc join --address HOST:PORT`.

Knows the name of the command alone.
"""

import sys

from wan_grpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["join", *sys.argv[1:]]))
