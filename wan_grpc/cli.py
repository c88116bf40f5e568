"""The command `wan-grpc`: which command was meant, what it prints, and its exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated. Does none of the work itself, and imports
what does only when it is needed.
"""

import asyncio
import difflib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn

from wan_grpc import __version__
from wan_grpc.domain.errors import InvalidRequestError, ServiceError, UnusableModelError
from wan_grpc.domain.events import Accepted, Event, Progress

if TYPE_CHECKING:
    from wan_grpc.config import GenerateSettings, MakeTinyModelSettings, ModelsSettings, ServeSettings, Settings
    from wan_grpc_client.bar import Bar

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143

_COMMANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "serve": "start a server and run until it is told to stop",
        "generate": "generate one video without a server",
        "models": "print what a running server can do",
        "make-tiny-model": "write a tiny checkpoint to a directory",
        "version": "print the version",
    }
)
_HELP: Final = "\n".join(
    [
        "usage: wan-grpc COMMAND [--flag VALUE]...",
        "",
        "Text becomes video: the Wan2.2 models behind gRPC.",
        "",
        "commands:",
        *(f"  {name:<17}{text}" for name, text in _COMMANDS.items()),
        "",
        "`wan-grpc COMMAND --help` shows the flags of a command.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `wan-grpc`; the exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    match command:
        case "-h" | "--help" | "help":
            print(_HELP)
            return DONE
        case "version" | "--version":
            print(f"wan-grpc {__version__}")
            return DONE
        case "":
            print(_HELP, file=sys.stderr)
            return WRONG_USAGE
        case name if name in _COMMANDS:
            try:
                return _run(name, rest)
            except KeyboardInterrupt:
                return INTERRUPTED
    close = difflib.get_close_matches(command, _COMMANDS, n=1)
    return _refuse("", [f"{command!r} is no command" + (f"; did you mean {close[0]}?" if close else "")])


def _run(name: str, arguments: Sequence[str]) -> int:
    """Load the settings and do what they say."""
    try:
        from wan_grpc import config
    except ModuleNotFoundError as error:
        return _fail(name, f"{error.name} is not installed; every command needs: pip install 'wan-grpc[server]'")
    try:
        settings = config.load(next(kind for kind in config.COMMANDS if kind.command == name), arguments)
    except config.UsageError as error:
        return _refuse(name, error.problems)
    try:
        return _do(settings)
    except InvalidRequestError as error:
        return _refuse(name, [f"{_flag(violation.field)}: {violation.description}" for violation in error.violations])
    except (UnusableModelError, ServiceError, OSError) as error:
        return _fail(name, _sentence(error))


def _do(settings: "Settings") -> int:
    from wan_grpc import config

    match settings:
        case config.ServeSettings():
            return _serve(settings)
        case config.GenerateSettings():
            return _generate(settings)
        case config.ModelsSettings():
            return _models(settings)
        case config.MakeTinyModelSettings():
            return _make_tiny_model(settings)
    raise AssertionError(settings)


def _serve(settings: "ServeSettings") -> int:
    from wan_grpc import app

    return asyncio.run(app.serve(settings, on_listening=_say_address))


def _say_address(host: str, port: int) -> None:
    """The one line on stdout, for scripts that let the system choose a port."""
    print(f"listening on {f'[{host}]' if ':' in host else host}:{port}", flush=True)


def _generate(settings: "GenerateSettings") -> int:
    from wan_grpc import app
    from wan_grpc_client.bar import Bar

    signal.signal(signal.SIGTERM, _leave)
    with Bar(sys.stderr) as bar:
        bar.wait("the ranks are starting")
        made = asyncio.run(app.generate(settings, on_event=lambda event: _show(bar, event)))
    video = made.video
    size = f"{video.width}x{video.height}, {video.num_frames} frames at {video.fps} fps"
    place = f"{made.path}: " if made.path else ""
    print(f"{place}{size}, {made.completed.size_bytes} bytes, seed {video.seed}")
    print(f"sha256 {made.completed.sha256}")
    return DONE


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def _show(bar: "Bar", event: Event) -> None:
    match event:
        case Accepted():
            for warning in event.warnings:
                bar.say(f"warning: {warning}")
        case Progress():
            bar.show(
                stage=event.stage,
                step=event.step,
                total_steps=event.total_steps,
                expert=event.expert,
                step_time_s=event.step_time_s,
                eta_s=event.eta_s,
            )


def _models(settings: "ModelsSettings") -> int:
    from wan_grpc_client import Client, WanGrpcError
    from wan_grpc_client.display import error_lines, model_lines

    try:
        with Client(settings.address) as client:
            lines = model_lines(client.get_model(timeout_s=settings.timeout_s))
    except WanGrpcError as error:
        return _fail(settings.command, f"{settings.address}: {' '.join(error_lines(error))}")
    for line in lines:
        print(line)
    return DONE


def _make_tiny_model(settings: "MakeTinyModelSettings") -> int:
    from wan_grpc.domain.variants import Task
    from wan_grpc.pipeline.tiny import make_tiny_model

    make_tiny_model(settings.directory, task=Task(settings.task))
    print(f"{settings.directory}: `wan-grpc serve --model-path {shlex.quote(str(settings.directory))}` serves it")
    return DONE


def _flag(field: str) -> str:
    return f"--{field.removeprefix('spec.').replace('_', '-')}"


def _refuse(name: str, problems: Sequence[str]) -> int:
    program = f"wan-grpc {name}".strip()
    for problem in problems:
        print(f"{program}: {problem}", file=sys.stderr)
    print(f"`{program} --help` shows what it takes", file=sys.stderr)
    return WRONG_USAGE


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(name: str, sentence: str) -> int:
    print(f"wan-grpc {name}: {sentence}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
