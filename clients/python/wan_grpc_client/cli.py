"""The command `wan-grpc-client`: what a server can do, from a terminal.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated. Interrupting a generation cancels it.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NoReturn, TextIO

import grpc

from wan_grpc import __version__
from wan_grpc_client.bar import Bar
from wan_grpc_client.client import UNARY_TIMEOUT_S, Client
from wan_grpc_client.display import error_lines, model_lines, show_event, status_lines, status_row, video_lines
from wan_grpc_client.errors import WanGrpcError
from wan_grpc_client.request import Options
from wan_grpc_client.sink import Output

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
SIGNALLED: Final = 128
_STDOUT: Final = "-"

_OPTION_FLAGS: Final[tuple[tuple[str, Callable[[str], object], str, str], ...]] = (
    ("negative-prompt", str, "TEXT", "what it should not show"),
    ("width", int, "N", "pixels; unset, here and below: as the model recommends"),
    ("height", int, "N", "pixels"),
    ("num-frames", int, "N", "one more than a multiple of 4"),
    ("fps", int, "N", "frames a second of the file"),
    ("num-inference-steps", int, "N", "denoising steps"),
    ("guidance-scale", float, "X", "of the high-noise expert"),
    ("guidance-scale-2", float, "X", "of the low-noise expert"),
    ("flow-shift", float, "X", "of the noise schedule"),
    ("boundary-ratio", float, "X", "share of the timesteps at and above which the high-noise expert works"),
    ("seed", int, "N", "unset: a random one, which is printed"),
    ("output-format", str, "NAME", "e.g. mp4_h264 (the default) or raw_rgb24"),
    ("max-duration-s", float, "SECONDS", "bound on the job itself, from acceptance to its last byte"),
    ("detach-grace-s", float, "SECONDS", "how long the job goes on while nobody watches it; inf: without limit"),
    ("request-id", str, "UUID4", "the same id and request attaches to the same generation; unset: a new one"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `wan-grpc-client`; the exit code."""
    asked = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    try:
        with Client(asked.address, credentials=_credentials(asked)) as client:
            asked.run(client, asked)
    except KeyboardInterrupt:
        return INTERRUPTED
    except WanGrpcError as error:
        _complain(asked, error_lines(error, field_name=_flag))
        return WRONG_USAGE if error.code is grpc.StatusCode.INVALID_ARGUMENT else FAILED
    except ValueError as error:
        _complain(asked, [str(error)])
        return WRONG_USAGE
    except OSError as error:
        _complain(asked, [f"{error.filename}: {error.strerror}" if error.filename else str(error)])
        return FAILED
    return DONE


def _generate(client: Client, asked: argparse.Namespace) -> None:
    output, words = _output(asked.output)
    options = Options(**{name: getattr(asked, name) for name in Options.__annotations__})  # type: ignore[typeddict-item]
    with (
        Bar(sys.stderr) as bar,
        client.generate(asked.prompt, output=output, timeout_s=asked.timeout, **options) as generation,
    ):
        bar.wait(f"waiting for {asked.address}")
        for event in generation:
            show_event(bar, event)
        video = generation.result()
    _tell(video_lines(video), words)


def _models(client: Client, asked: argparse.Namespace) -> None:
    _tell(model_lines(client.get_model(timeout_s=asked.timeout)), sys.stdout)


def _get(client: Client, asked: argparse.Namespace) -> None:
    _tell(status_lines(client.get_generation(asked.name, timeout_s=asked.timeout)), sys.stdout)


def _list(client: Client, asked: argparse.Namespace) -> None:
    _tell(map(status_row, client.list_generations(states=asked.state, timeout_s=asked.timeout)), sys.stdout)


def _cancel(client: Client, asked: argparse.Namespace) -> None:
    _tell(status_lines(client.cancel_generation(asked.name, timeout_s=asked.timeout)), sys.stdout)


def _delete(client: Client, asked: argparse.Namespace) -> None:
    client.delete_generation(asked.name, timeout_s=asked.timeout)
    _tell([f"{asked.name} is removed"], sys.stdout)


def _download(client: Client, asked: argparse.Namespace) -> None:
    output, words = _output(asked.output)
    video = client.download_video(asked.name, output=output, timeout_s=asked.timeout)
    _tell([f"{asked.output}: {video.size_bytes} bytes, {video.output_format}", f"sha256 {video.sha256}"], words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wan-grpc-client", description="Makes videos on a wan-grpc server.")
    parser.add_argument("--version", action="version", version=f"wan-grpc-client {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    generate = _add_command(commands, _generate, "generate", "make a video and bring it here", timeout_s=None)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what the video shows")
    generate.add_argument("--output", default="video.mp4", metavar="FILE", help="where to write it; -: stdout")
    for name, kind, metavar, text in _OPTION_FLAGS:
        generate.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    _add_command(commands, _models, "models", "print what the server can do")
    _add_command(commands, _get, "get", "print how a generation stands", takes_name=True)
    listing = _add_command(commands, _list, "list", "print the generations that the server knows, newest first")
    listing.add_argument("--state", action="append", default=[], help="only these, e.g. running; may be repeated")
    _add_command(commands, _cancel, "cancel", "cancel a generation", takes_name=True)
    _add_command(commands, _delete, "delete", "remove a generation that has ended, and its video", takes_name=True)
    download = _add_command(commands, _download, "download", "fetch a finished video", takes_name=True, timeout_s=None)
    download.add_argument("--output", required=True, metavar="FILE", help="where to write it; -: stdout")
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    run: Callable[[Client, argparse.Namespace], None],
    name: str,
    text: str,
    *,
    takes_name: bool = False,
    timeout_s: float | None = UNARY_TIMEOUT_S,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    if takes_name:
        command.add_argument("name", metavar="NAME", help="generations/{id}")
    command.add_argument("--address", default="127.0.0.1:3000", metavar="HOST:PORT", help="default: %(default)s")
    shown = "none" if timeout_s is None else f"{timeout_s:g}"
    command.add_argument("--timeout", type=float, default=timeout_s, metavar="SECONDS", help=f"default: {shown}")
    command.add_argument("--tls", action="store_true", help="encrypt, and verify the server")
    command.add_argument("--tls-ca-file", type=Path, metavar="PEM", help="whom to trust; unset: the usual authorities")
    return command


def _credentials(asked: argparse.Namespace) -> grpc.ChannelCredentials | None:
    if not asked.tls and asked.tls_ca_file is None:
        return None
    roots = asked.tls_ca_file.read_bytes() if asked.tls_ca_file else None
    return grpc.ssl_channel_credentials(root_certificates=roots)


def _output(asked: str) -> tuple[Output, TextIO]:
    """Where the video goes, and the stream that is left for words."""
    return (sys.stdout.buffer, sys.stderr) if asked == _STDOUT else (asked, sys.stdout)


def _flag(field: str) -> str:
    """The flag that sets a field of the request; the field itself where there is none."""
    name = field.removeprefix("spec.")
    found = next((flag for flag in (name, f"{name}_s") if flag in {"prompt", *Options.__annotations__}), None)
    return f"--{found.replace('_', '-')}" if found else field


def _tell(lines: Iterable[str], stream: TextIO) -> None:
    for line in lines:
        print(line, file=stream, flush=True)


def _complain(asked: argparse.Namespace, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines):
        print(line if number else f"wan-grpc-client {asked.command}: {line}", file=sys.stderr)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(SIGNALLED + number)


if __name__ == "__main__":
    sys.exit(main())
