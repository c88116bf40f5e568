"""The command `wan-grpc`: which command was meant, what it prints, and its exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated. Does none of the work itself, and imports
what does only when it is needed.
"""

import contextlib
import difflib
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from wan_grpc import __version__
from wan_grpc.domain.errors import ServiceError, UnusableModelError, Violation
from wan_grpc.domain.events import Accepted, Event, Progress
from wan_grpc.domain.formats import Encoding, OutputFormat, PixelFormat
from wan_grpc.domain.images import ImageFit
from wan_grpc.domain.request import GenerationRequest

if TYPE_CHECKING:
    from wan_grpc import app
    from wan_grpc.config import (
        GenerateSettings,
        JoinSettings,
        MakeTinyModelSettings,
        ModelsSettings,
        ServeSettings,
        Settings,
    )
    from wan_grpc_client.bar import Bar
    from wan_grpc_client.batch import Job

T = TypeVar("T")

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143

_COMMANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "serve": "start a server and run until it is told to stop",
        "generate": "generate videos without a server",
        "join": "lend a rank of this host to a server on another host",
        "models": "print what a running server can do",
        "make-tiny-model": "write a tiny checkpoint with random weights to a directory",
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
    except config.UsageError as error:
        return _refuse(name, error.problems)
    except (UnusableModelError, ServiceError, OSError) as error:
        return _fail(name, _sentence(error))


def _do(settings: "Settings") -> int:
    from wan_grpc import config

    match settings:
        case config.ServeSettings():
            return _serve(settings)
        case config.GenerateSettings():
            return _generate(settings)
        case config.JoinSettings():
            return _join(settings)
        case config.ModelsSettings():
            return _models(settings)
        case config.MakeTinyModelSettings():
            return _make_tiny_model(settings)
    raise AssertionError(settings)


def _serve(settings: "ServeSettings") -> int:
    import asyncio

    from wan_grpc import app

    return asyncio.run(app.serve(settings, on_listening=_say_address))


def _say_address(host: str, port: int) -> None:
    """The one line on stdout, for scripts that let the system choose a port."""
    print(f"listening on {f'[{host}]' if ':' in host else host}:{port}", flush=True)


def _generate(settings: "GenerateSettings") -> int:
    import asyncio

    from wan_grpc import app
    from wan_grpc.config import UsageError
    from wan_grpc_client.bar import Bar
    from wan_grpc_client.batch import FIELDS, BatchError, plan

    signal.signal(signal.SIGTERM, _leave)
    flags = settings.model_dump(include=set(FIELDS))
    directory = settings.output_path if settings.save_output else None
    try:
        planned = plan(flags, prompts_file=settings.prompts_file, directory=directory, name_flag="--output-file-name")
    except BatchError as error:
        raise UsageError(error.problems) from error
    try:
        with Bar(sys.stderr) as bar:
            bar.wait("the ranks are starting")
            return asyncio.run(_make(settings, planned, bar))
    except app.RefusedJobsError as error:
        problems = [_problem(settings, planned[number], violation) for number, violation in error.violations]
        raise UsageError(list(dict.fromkeys(problems))) from error


async def _make(settings: "GenerateSettings", planned: Sequence["Job"], bar: "Bar") -> int:
    """Make what was planned, a line or two about each video; the exit code."""
    from wan_grpc import app

    def on_event(number: int, event: Event) -> None:
        if isinstance(event, Accepted) and len(planned) > 1:
            bar.wait(f"{number + 1} of {len(planned)}")
        _show(bar, event)

    code = DONE
    is_one = len(planned) == 1 and settings.prompts_file is None
    outcomes = app.generate(settings, [_offline(job) for job in planned], on_event)
    async with contextlib.aclosing(outcomes):
        for job in planned:
            outcome = await anext(outcomes)
            bar.close()
            if isinstance(outcome, app.Made):
                print(*_facts(outcome, job), sep="\n" if is_one else ", ", flush=True)
            else:
                place = "" if is_one else f"{job.place or 'seed ' + str(job.values['seed'])}: "
                code = _fail(settings.command, f"{place}{_sentence(outcome)}")
    return code


def _offline(job: "Job") -> "app.Job":
    """The job in the engine's words."""
    from wan_grpc import app

    said = dict(job.values)
    paths = {name: said.pop(name, None) for name in ("image", "last_image")}
    encoding = Encoding(
        crf=said.pop("crf", None),
        bitrate_bps=said.pop("bitrate_bps", None),
        quality=said.pop("quality", None),
        pixel_format=_as(PixelFormat, said.pop("pixel_format", None)),
    )
    request = GenerationRequest(
        image_fit=_as(ImageFit, said.pop("image_fit", None)),
        output_format=_as(OutputFormat, said.pop("output_format", None)),
        encoding=encoding,
        **said,
    )
    return app.Job(request=request, path=job.path, **paths)


def _as(kind: Callable[[str], T], name: str | None) -> T | None:
    return None if name is None else kind(name)


def _facts(made: "app.Made", job: "Job") -> tuple[str, str]:
    from wan_grpc_client.display import picture_words

    video = made.video
    place = f"{job.path}: " if job.path else ""
    size = picture_words(video.width, video.height, video.num_frames, video.fps)
    return f"{place}{size}, {made.completed.size_bytes} bytes, seed {video.seed}", f"sha256 {made.completed.sha256}"


def _problem(settings: "GenerateSettings", job: "Job", violation: Violation) -> str:
    """What is wrong, under the name by which it was said: a field of a line, or a flag."""
    name = violation.field.removeprefix("spec.").removeprefix("encoding.").replace("output_format", "format")
    if job.place:
        return f"{job.place}: {name}: {violation.description}"
    if settings.size is not None and name in ("width", "height"):
        name = "size"
    return f"{_flag(name)}: {violation.description}"


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


def _join(settings: "JoinSettings") -> int:
    from wan_grpc.config import UsageError, place_on_host, split_address
    from wan_grpc.engine.joined import NotTakenError, Place, stay_joined
    from wan_grpc.engine.links import Endpoint, RefusedError, read_secret
    from wan_grpc.telemetry import logs

    local_rank, num_local = place_on_host()
    assert settings.address is not None and settings.secret_file is not None, "they must be given"
    host, port = split_address(settings.address)
    try:
        secret = read_secret(settings.secret_file)
    except ValueError as error:
        raise UsageError([f"--secret-file: {error}"]) from error
    except OSError as error:
        raise UsageError([f"--secret-file: {settings.secret_file}: cannot be read: {error.strerror}"]) from error
    logs.configure(level=settings.log_level, log_format=settings.log_format)
    place = Place(
        server=Endpoint(host=host, port=port),
        secret=secret,
        node_rank=settings.node_rank,
        local_rank=local_rank,
        num_local=num_local,
        model_path=settings.model_path,
        cache_dir=settings.cache_dir.expanduser(),
    )
    try:
        stay_joined(place, give_up_after_s=settings.give_up_after_s)
    except (RefusedError, NotTakenError) as error:
        return _fail(settings.command, _sentence(error))
    return DONE


def _models(settings: "ModelsSettings") -> int:
    from wan_grpc_client import Client, WanGrpcError
    from wan_grpc_client.display import error_lines
    from wan_grpc_client.model_table import model_lines

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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
