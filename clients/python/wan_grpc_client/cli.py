"""The command `wan-grpc-client`: what a server can do, from a terminal.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated. Interrupting a generation cancels it.
"""

import argparse
import functools
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import grpc

from wan_grpc import __version__
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc_client.bar import Bar
from wan_grpc_client.batch import DEFAULT_FORMAT, FIELDS, MAX_OUTPUTS, PICTURES, BatchError, Job, plan, suffix
from wan_grpc_client.client import UNARY_TIMEOUT_S, Client
from wan_grpc_client.display import error_lines, show_event, status_lines, status_row, video_lines
from wan_grpc_client.errors import TryAgainError, WanGrpcError
from wan_grpc_client.events import Preview
from wan_grpc_client.following import Video
from wan_grpc_client.model_table import model_lines
from wan_grpc_client.request import Options, frame_size, generate_request, known_names
from wan_grpc_client.sink import Output

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
SIGNALLED: Final = 128
_STDOUT: Final = "-"
_PREVIEW_EVERY: Final = 5
_TOKEN_BYTES: Final = 8


def _size(text: str) -> str:
    try:
        frame_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from error
    return text


_JOB_FLAGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "negative-prompt": {"metavar": "TEXT", "help": "what it should not show"},
    "image": {"type": Path, "metavar": "FILE", "help": "first image of the video: a PNG, JPEG or WebP file"},
    "last-image": {"type": Path, "metavar": "FILE", "help": "last image of the video, likewise"},
    "image-fit": {
        "choices": known_names(pb.ImageFit),
        "help": "how images come to the exact size; unset: the video takes the aspect of its first image",
    },
    "size": {"type": _size, "metavar": "WxH", "help": "e.g. 832x480; unset, here and below: as the model recommends"},
    "width": {"type": int, "metavar": "N", "help": "pixels, instead of --size"},
    "height": {"type": int, "metavar": "N", "help": "pixels, instead of --size"},
    "num-frames": {"type": int, "metavar": "N", "help": "one more than a multiple of 4; 1 for a picture"},
    "fps": {"type": int, "metavar": "N", "help": "frames a second of the file"},
    "num-inference-steps": {"type": int, "metavar": "N", "help": "denoising steps"},
    "guidance-scale": {"type": float, "metavar": "X", "help": "of the high-noise expert"},
    "guidance-scale-2": {"type": float, "metavar": "X", "help": "of the low-noise expert"},
    "flow-shift": {"type": float, "metavar": "X", "help": "of the noise schedule"},
    "boundary-ratio": {
        "type": float,
        "metavar": "X",
        "help": "share of the timesteps at and above which the high-noise expert works",
    },
    "seed": {"type": int, "metavar": "N", "help": "unset: a random one, which is printed"},
    "num-outputs": {
        "type": int,
        "choices": range(1, MAX_OUTPUTS + 1),
        "metavar": "N",
        "help": f"1 to {MAX_OUTPUTS} videos with consecutive seeds, one after the other, each with a file of its own",
    },
    "format": {
        "choices": known_names(pb.OutputFormat),
        "metavar": "NAME",
        "help": f"one of {', '.join(known_names(pb.OutputFormat))}; unset: {DEFAULT_FORMAT}",
    },
    "crf": {"type": int, "metavar": "N", "help": "constant quality of a video codec, 0 is best"},
    "bitrate-bps": {"type": int, "metavar": "N", "help": "mean bits a second, instead of --crf"},
    "quality": {"type": int, "metavar": "N", "help": "of JPEG and WebP, 1 to 100, 100 is best"},
    "pixel-format": {"choices": known_names(pb.PixelFormat), "metavar": "NAME", "help": "e.g. yuv444p"},
}
"""Flags of `generate` that a line of a file of prompts may say, too, and what argparse is to know of them."""
_CALL_FLAGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "preview-every-steps": {
        "type": int,
        "metavar": "N",
        "help": f"denoising steps from one picture in --preview to the next; unset: {_PREVIEW_EVERY}",
    },
    "max-duration-s": {
        "type": float,
        "metavar": "SECONDS",
        "help": "bound on the job itself, from acceptance to its last byte",
    },
    "detach-grace-s": {
        "type": float,
        "metavar": "SECONDS",
        "help": "how long the job goes on while nobody watches it; inf: without limit",
    },
    "request-id": {
        "metavar": "UUID4",
        "help": "the same id and request attaches to the same generation; unset: a new one",
    },
}
_OTHER_NAMES: Final = {"image": ("--image-path",), "format": ("--output-format",)}
_SPELLED: Final = {
    "output_format": "format",
    "max_duration": "max_duration_s",
    "detach_grace": "detach_grace_s",
}
_FULL_RETRY_S: Final = 5.0
_FULL: Final = frozenset({"QUEUE_FULL", "TOO_MANY_CALLS"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `wan-grpc-client`; the exit code."""
    asked = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    try:
        with Client(asked.address, credentials=_credentials(asked)) as client:
            return asked.run(client, asked) or DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    except WanGrpcError as error:
        _complain(asked, error_lines(error, field_name=functools.partial(_flag, asked)))
        return WRONG_USAGE if error.code is grpc.StatusCode.INVALID_ARGUMENT else FAILED
    except BatchError as error:
        for problem in error.problems:
            _complain(asked, [problem])
        return WRONG_USAGE
    except ValueError as error:
        _complain(asked, [str(error)])
        return WRONG_USAGE
    except OSError as error:
        _complain(asked, [_os_sentence(error)])
        return FAILED


def _generate(client: Client, asked: argparse.Namespace) -> int:
    """Make what is asked for, one video after the other; the exit code."""
    jobs = _plan(asked)
    code = DONE
    is_one = len(jobs) == 1 and asked.prompts_file is None
    for number, job in enumerate(jobs, 1):
        with Bar(sys.stderr) as bar:
            place = "" if is_one else f"{number} of {len(jobs)}: "
            try:
                video = _make(client, asked, job, bar, place)
            except (WanGrpcError, OSError) as error:
                if is_one:
                    raise
                bar.close()
                code = _tell_failure(asked, job, error)
                continue
        lines = video_lines(video)
        _tell(lines if is_one else [", ".join(lines)], sys.stderr if asked.output == _STDOUT else sys.stdout)
    return code


def _plan(asked: argparse.Namespace) -> Sequence[Job]:
    """The jobs, checked as far as that can be done here.

    Raises:
        BatchError: naming every fault.
    """
    flags = {name: getattr(asked, name, None) for name in FIELDS}
    if asked.output is not None:
        flags["output_file_name"] = asked.output
    elif asked.prompts_file is None:
        picture = asked.format in PICTURES
        flags["output_file_name"] = ("picture" if picture else "video") + suffix(asked.format)
    if problems := list(_conflicts(asked)):
        raise BatchError(problems)
    directory = None if asked.output == _STDOUT else asked.output_path
    jobs = plan(flags, prompts_file=asked.prompts_file, directory=directory, name_flag="--output")
    if problems := [fault for job in jobs for fault in _faults(asked, job)]:
        raise BatchError(list(dict.fromkeys(problems)))
    for path in (asked.output_path, *(job.path.parent for job in jobs if job.place and job.path)):
        path.mkdir(parents=True, exist_ok=True)
    return jobs


def _conflicts(asked: argparse.Namespace) -> Iterator[str]:
    if (asked.prompt is None) == (asked.prompts_file is None):
        yield "--prompt or --prompts-file: one of them, and not both, must be given"
    if asked.size is not None and (asked.width is not None or asked.height is not None):
        yield "--size: not with --width or --height"
    if asked.crf is not None and asked.bitrate_bps is not None:
        yield "--crf: not with --bitrate-bps"
    is_one = asked.prompts_file is None and (asked.num_outputs or 1) == 1
    if asked.output == _STDOUT and not is_one:
        yield "--output: stdout takes one video"
    elif asked.output is not None and asked.prompts_file is not None:
        yield "--output: not with --prompts-file, whose lines may have an output_file_name each"
    if asked.preview_every_steps is not None and asked.preview is None:
        yield "--preview-every-steps: needs --preview, where the pictures are kept"
    if asked.preview is not None and asked.preview.is_dir():
        yield f"--preview: {asked.preview} is a directory"
    elif asked.preview is not None and not asked.preview.absolute().parent.is_dir():
        yield f"--preview: {asked.preview.parent} is no directory"
    if asked.request_id is not None and not is_one:
        yield "--request-id: names one generation"


def _faults(asked: argparse.Namespace, job: Job) -> Iterator[str]:
    """What of a job cannot be sent, each under its field of the line, or its flag."""
    try:
        generate_request(job.values["prompt"], _options(asked, job))
    except ValueError as error:
        name, _, sentence = str(error).partition(": ")
        yield f"{_said(job, name)}: {sentence}"
    except OSError as error:
        named = (name for name in ("image", "last_image") if str(job.values.get(name)) == error.filename)
        yield f"{_said(job, next(named, 'image'))}: {_os_sentence(error)}"


def _said(job: Job, name: str) -> str:
    """Where and how a field of a job was said."""
    spelled = _SPELLED.get(name, name)
    return f"{job.place}: {spelled}" if job.place else f"--{spelled.replace('_', '-')}"


def _options(asked: argparse.Namespace, job: Job) -> Options:
    options = Options()
    for name in (flag.replace("-", "_") for flag in _CALL_FLAGS):
        options[name] = getattr(asked, name)  # type: ignore[literal-required]
    if asked.preview is not None and asked.preview_every_steps is None:
        options["preview_every_steps"] = _PREVIEW_EVERY
    for name in job.values.keys() - {"prompt"}:
        options[name] = job.values[name]  # type: ignore[literal-required]
    return options


def _make(client: Client, asked: argparse.Namespace, job: Job, bar: Bar, place: str) -> Video:
    """One video. Where it is one of several, which `place` says, a full queue is waited for."""
    options = _options(asked, job)
    output: Output = sys.stdout.buffer if asked.output == _STDOUT else job.path
    while True:
        try:
            with client.generate(job.values["prompt"], output=output, timeout_s=asked.timeout, **options) as generation:
                bar.wait(f"{place}waiting for {asked.address}")
                for event in generation:
                    show_event(bar, event)
                    if isinstance(event, Preview) and asked.preview is not None:
                        _keep_preview(asked.preview, event, bar)
                return generation.result()
        except TryAgainError as error:
            if not place or error.reason not in _FULL:
                raise
            bar.wait(f"{place}{error.message}; trying again")
            time.sleep(error.retry_after_s or _FULL_RETRY_S)


def _keep_preview(path: Path, preview: Preview, bar: Bar) -> None:
    """Put the picture in the place of the one before it. A video is not given up for a picture that cannot be kept."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}.part")
    try:
        try:
            scratch.write_bytes(preview.data)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        bar.say(f"no preview of step {preview.step}: {_os_sentence(error)}")


def _tell_failure(asked: argparse.Namespace, job: Job, error: WanGrpcError | OSError) -> int:
    """Say why there is no such video, and under which line it was asked for; the exit code."""
    lines = [_os_sentence(error)] if isinstance(error, OSError) else list(error_lines(error, field_name=_field))
    place = f"{job.place}: " if job.place else f"seed {job.values['seed']}: "
    _complain(asked, [f"{place}{lines[0]}", *lines[1:]])
    return FAILED


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
    _add_generate(commands)
    _add_command(commands, _models, "models", "print what the server can do")
    _add_command(commands, _get, "get", "print how a generation stands", takes_name=True)
    listing = _add_command(commands, _list, "list", "print the generations that the server knows, newest first")
    listing.add_argument("--state", action="append", default=[], help="only these, e.g. running; may be repeated")
    _add_command(commands, _cancel, "cancel", "cancel a generation", takes_name=True)
    _add_command(commands, _delete, "delete", "remove a generation that has ended, and its video", takes_name=True)
    download = _add_command(commands, _download, "download", "fetch a finished video", takes_name=True, timeout_s=None)
    download.add_argument("--output", required=True, metavar="FILE", help="where to write it; -: stdout")
    return parser


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = _add_command(commands, _generate, "generate", "make a video and bring it here", timeout_s=None)
    generate.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    generate.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="instead of --prompt: a file of videos, one JSON object a line, with the names of these flags, as in "
        '{"prompt": "A fox", "num_frames": 17}; what a line leaves out, the flags say; made one after the other',
    )
    generate.add_argument(
        "--output", metavar="FILE", help="where to write it; -: stdout; unset: video.mp4, picture.png..."
    )
    generate.add_argument("--output-path", type=Path, default=Path(), metavar="DIR", help="directory of files")
    generate.add_argument(
        "--preview",
        type=Path,
        metavar="FILE",
        help="where to keep a small picture (WebP) of what is being made, a newer one in the place of an older one",
    )
    for name, options in {**_JOB_FLAGS, **_CALL_FLAGS}.items():
        generate.add_argument(f"--{name}", *_OTHER_NAMES.get(name, ()), **options)


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    run: Callable[[Client, argparse.Namespace], int | None],
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


def _flag(asked: argparse.Namespace, field: str) -> str:
    """The flag that sets a field of the request; the field itself where there is none."""
    name = _field(field)
    if name in {"width", "height"} and getattr(asked, "size", None) is not None:
        name = "size"
    return f"--{name.replace('_', '-')}" if hasattr(asked, name) else field


def _field(field: str) -> str:
    """A field of the request as flags and lines spell it."""
    name = field.removeprefix("spec.").removeprefix("encoding.")
    return _SPELLED.get(name, name)


def _os_sentence(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


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
