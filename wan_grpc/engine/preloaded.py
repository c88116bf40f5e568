"""What the forkserver imports: first its tie to the server, so that it ends even while it imports the rest for ranks.

Nobody else may import it.
"""

import signal

from wan_grpc.engine.lifeline import end_with_parent

end_with_parent()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also for one that was started in place of one that died

import wan_grpc.engine.worker  # noqa: E402, F401  # takes seconds
