"""The settings of every command, defined once: each field is a flag, a WAN_GRPC_* variable and a key of a YAML file.

The only reader of the command line, the environment and the configuration file. Does not know what a setting does.
"""

import difflib
import os
import re
import textwrap
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, TypeVar, get_args

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from wan_grpc.domain.formats import OutputFormat, PixelFormat
from wan_grpc.domain.images import ImageFit
from wan_grpc.domain.variants import Limits

ENV_PREFIX: Final = "WAN_GRPC_"
OFF: Final = -1
LIMITS: Final = Limits()
CACHE_DIR: Final = Path("~/.cache/wan-grpc")
"""Where embedded models are put together by default."""
NOT_YET: Final = frozenset(
    {
        "dit_cpu_offload",
        "dit_layerwise_offload",
        "image_encoder_cpu_offload",
        "lora_path",
        "pin_cpu_memory",
        "text_encoder_cpu_offload",
        "vae_cpu_offload",
        "vae_path",
    }
)
"""Settings that servers of Wan2.2 are known to have and this version has not: refused by name."""
SYNONYMS: Final[Mapping[str, str]] = MappingProxyType({"image_path": "image", "output_format": "format"})
"""Names that a setting goes by elsewhere, and its name here. Both are taken."""
MAX_OUTPUTS: Final = 8

_SERVICE_LINK: Final = re.compile(rf"{ENV_PREFIX}(SERVICE_(HOST|PORT.*)|PORT_\d+_.*)")
_LINKED_PORT: Final = ("tcp://", "udp://", "sctp://")
"""Kubernetes puts such names, and such a value of the name of --port, into every pod beside a Service `wan-grpc`."""

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""What GetModel can tell."""
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LogLevel = Literal["debug", "info", "warning", "error"]
SecondsOrNone = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path.parts[0]} is nobody's home") from error


ExpandedPath = Annotated[Path, AfterValidator(_expanded)]
"""`~` is the user's home, however the path was given: no shell expands it in `--flag=~/x` or in a file."""


FRAME_SIZE: Final = re.compile(r"[0-9]{1,9}[x*][0-9]{1,9}")


def _frame_size(text: str) -> str:
    if not FRAME_SIZE.fullmatch(text):
        raise ValueError("must be WIDTHxHEIGHT such as 832x480")
    return text


FrameSize = Annotated[str, AfterValidator(_frame_size)]


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_whole = bool(bare) and colon == ":" and port.isdecimal() and int(port) <= 65535
    if not is_whole or (":" in bare) != host.startswith("["):
        raise ValueError("must be HOST:PORT such as 10.0.0.1:3001")
    return bare, int(port)


def _host_port(text: str) -> str:
    split_address(text)
    return text


HostPort = Annotated[str, AfterValidator(_host_port)]


def _setting(default: Any, text: str, *, group: str) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group})


_TYPE_WORDS: Final = {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH"}


class UsageError(Exception):
    """Settings that cannot be used, every fault with the name under which it was given."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Settings(BaseSettings):
    """What every command takes."""

    model_config = SettingsConfigDict(
        defer_build=True, frozen=True, extra="forbid", env_prefix=ENV_PREFIX, cli_parse_none_str="\0"
    )
    command: ClassVar[str]

    config: ExpandedPath | None = _setting(
        None, "YAML file with settings, one `some_name: value` a line", group="general"
    )
    log_level: LogLevel = _setting("info", "the least severe messages to log", group="general")
    log_format: Literal["auto", "console", "json"] = _setting(
        "auto", "how to log to stderr; auto: console on a terminal, else json", group="general"
    )

    @classmethod
    def conflicts(cls, given: Collection[str]) -> Iterator[str]:
        """Why these settings cannot be given together, or at least one more must be."""
        yield from ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` merges the others, while it still knows where each value came from


class RankSettings(Settings):
    """The model and the processes that compute with it."""

    model_path: str | None = _setting(
        None,
        "directory in the published diffusers layout, a hub id, or an embedded model: wan-tiny-t2v, wan-tiny-ti2v; "
        "unset: wan-tiny-t2v",
        group="model and ranks",
    )
    load_format: Literal["auto", "dummy"] = _setting(
        "auto",
        "auto: the checkpoint's safetensors; dummy: random weights of the same shapes, for benchmarks",
        group="model and ranks",
    )
    device: Literal["auto", "cuda", "cpu"] = _setting(
        "auto", "where the ranks compute; auto: cuda where there is one", group="model and ranks"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _setting(
        "auto", "of the transformers; auto: bfloat16 on cuda, float32 on the CPU", group="model and ranks"
    )
    num_gpus: Count = _setting(
        1,
        "number of ranks, one process and one device each; those of a replica compute each video together",
        group="model and ranks",
    )
    replicas: Count = _setting(
        1,
        "equal groups into which the ranks fall; each takes the next generation when it is free, so that as many are "
        "computed at the same time",
        group="model and ranks",
    )
    enable_cfg_parallel: bool | None = _setting(
        None,
        "have one half of a group compute the pass with the prompt and the other half the one without; unset, like the "
        "degrees below: what is best for the model and the number of ranks in a group",
        group="model and ranks",
    )
    sp_degree: Count | None = _setting(
        None,
        "ranks between which the tokens of a pass are divided: --ring-degree x --ulysses-degree",
        group="model and ranks",
    )
    ulysses_degree: Count | None = _setting(
        None,
        "of them, ranks that exchange tokens for heads; divides the heads of the transformer",
        group="model and ranks",
    )
    ring_degree: Count | None = _setting(
        None, "of them, ranks between which keys and values go round", group="model and ranks"
    )
    tp_size: Count = _setting(
        1, "ranks between which each layer of the text encoder is divided", group="model and ranks"
    )
    nnodes: Count = _setting(
        1,
        "number of hosts that the ranks are on, as many on each; the first of them are here, for the others run "
        "`wan-grpc join` there",
        group="model and ranks",
    )
    join_address: HostPort | None = _setting(
        None,
        "HOST:PORT to listen on for ranks of other hosts, with more than one of --nnodes: the address of this host in "
        "a network that can be trusted; port 0: a free one, which the log tells",
        group="model and ranks",
    )
    join_secret_file: ExpandedPath | None = _setting(
        None,
        "file of at least 16 bytes that this and the other hosts know and nobody else; others than its owner and group "
        "must not be able to read it",
        group="model and ranks",
    )
    cpu_threads: Count | None = _setting(
        None, "CPU threads of each rank; unset: the cores, divided by the ranks", group="model and ranks"
    )
    start_timeout_s: Seconds = _setting(1800.0, "longest time for the ranks to load the model", group="model and ranks")
    watchdog_grace_s: Seconds = _setting(
        10.0,
        "ranks that are silent for longer than three steps take and this time are ended and started again; after a "
        "failure on one of them three times what their links took is added",
        group="model and ranks",
    )
    first_step_timeout_s: Seconds = _setting(
        600.0,
        "and those that are silent for this time at a step of which nothing is known yet",
        group="model and ranks",
    )
    max_failed_starts: Count = _setting(
        3,
        "the process ends when the ranks, of each replica, fail to start this often within the window",
        group="model and ranks",
    )
    failed_start_window_s: Seconds = _setting(600.0, "the window of --max-failed-starts", group="model and ranks")
    max_area: Count = _setting(LIMITS.max_area, "most pixels of a frame", group="limits of a request")
    max_num_frames: Count = _setting(LIMITS.max_num_frames, "most frames of a video", group="limits of a request")
    max_inference_steps: Count = _setting(
        LIMITS.max_inference_steps, "most denoising steps of a video", group="limits of a request"
    )
    max_prompt_bytes: Annotated[int, Field(ge=1, le=2**20)] = _setting(
        LIMITS.max_prompt_bytes, "most bytes of a prompt in UTF-8", group="limits of a request"
    )
    max_image_bytes: Annotated[int, Field(ge=1, le=2**28)] = _setting(
        LIMITS.max_image_bytes, "most bytes of an input image, as a file", group="limits of a request"
    )
    max_image_pixels: Count = _setting(
        LIMITS.max_image_pixels, "most pixels of an input image: what decoding it may cost", group="limits of a request"
    )
    default_negative_prompt_file: ExpandedPath | None = _setting(
        None,
        "UTF-8 text that is the negative prompt of requests that say nothing about theirs; unset: an empty one",
        group="defaults of a request",
    )
    cache_dir: ExpandedPath = _setting(
        CACHE_DIR, "directory in which an embedded model is put together", group="storage"
    )
    spool_dir: ExpandedPath | None = _setting(
        None, "directory for videos and frames in the making; unset: the system's for temporary files", group="storage"
    )


class ServeSettings(RankSettings):
    """Start a server and run until it is told to stop."""

    command = "serve"

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface", group="network")
    port: Port = _setting(3000, "port to listen on; 0: a free one, printed on stdout", group="network")
    metrics_host: str | None = _setting(None, "address of the metrics; unset: that of --host", group="network")
    metrics_port: Annotated[int, Field(ge=OFF, le=65535)] = _setting(
        9464, "port of the Prometheus metrics; 0: a free one, -1: none", group="network"
    )
    keepalive_time_s: Seconds = _setting(60.0, "silence after which the server pings a client", group="network")
    keepalive_timeout_s: Seconds = _setting(20.0, "unanswered, that ping ends the connection after", group="network")
    min_ping_interval_s: Seconds = _setting(
        10.0, "clients that ping more often than this are cut off; theirs must be above it", group="network"
    )
    max_connection_age_s: Seconds | None = _setting(
        None, "age at which a connection is asked to end once its calls have; unset: never", group="network"
    )
    max_connection_age_grace_s: Seconds | None = _setting(
        None, "cut the calls of such a connection after this time; unset: never", group="network"
    )
    max_concurrent_calls: Count = _setting(1024, "calls of the API served at once", group="network")
    max_queue: Annotated[int, Field(ge=0, le=2**31 - 1)] = _setting(
        16, "generations that may wait; further ones are refused", group="generations"
    )
    detach_grace_s: Annotated[float, Field(ge=0)] = _setting(
        15.0, "a generation that nobody watches is cancelled after this time; inf: never", group="generations"
    )
    heartbeat_s: Annotated[float, Field(gt=0, le=15)] = _setting(
        15.0, "silence on a stream after which it carries a heartbeat; at most 15", group="generations"
    )
    drain_window_s: SecondsOrNone = _setting(
        5.0,
        "on SIGTERM: time to go on taking requests while health already says NOT_SERVING, for balancers to see",
        group="stopping",
    )
    drain_timeout_s: SecondsOrNone = _setting(
        600.0,
        "then: time for accepted work to end before it is cancelled; a second SIGTERM or SIGINT cancels it at once",
        group="stopping",
    )
    max_encoding: Count = _setting(
        4, "videos that may still be encoded while the ranks compute later ones", group="generations"
    )
    retain_s: SecondsOrNone = _setting(
        3600.0, "how long an ended generation and its video can be asked for", group="storage"
    )
    retain_count: Annotated[int, Field(ge=0)] = _setting(64, "and how many of them at most", group="storage")


class GenerateSettings(RankSettings):
    """Generate videos without a server: the same engine, the same ranks."""

    command = "generate"

    log_level: LogLevel = _setting("warning", "the least severe messages to log", group="general")
    prompt: str | None = _setting(None, "what the video shows", group="video")
    prompts_file: ExpandedPath | None = _setting(
        None,
        "instead of --prompt: a file of videos, one JSON object a line, with the names of the flags below (and prompt) "
        'as in {"prompt": "A fox", "seed": 7}; what a line leaves out, the flags say',
        group="video",
    )
    negative_prompt: str | None = _setting(None, "what it should not show; unset: as the operator chose", group="video")
    image: ExpandedPath | None = _setting(None, "first image of the video: a PNG, JPEG or WebP file", group="video")
    last_image: ExpandedPath | None = _setting(None, "last image of the video, likewise", group="video")
    image_fit: ImageFit | None = _setting(
        None,
        "how images come to the exact size; unset: the video takes the aspect of its first image, with at most as many "
        "pixels",
        group="video",
    )
    size: FrameSize | None = _setting(
        None, "WIDTHxHEIGHT, such as 832x480; unset, here and below: as the model recommends", group="video"
    )
    width: int | None = _setting(None, "pixels, instead of --size", group="video")
    height: int | None = _setting(None, "pixels, instead of --size", group="video")
    num_frames: int | None = _setting(None, "one more than a multiple of 4; 1 for a picture", group="video")
    fps: int | None = _setting(None, "frames a second of the file", group="video")
    num_inference_steps: int | None = _setting(None, "denoising steps", group="video")
    guidance_scale: float | None = _setting(None, "of the high-noise expert", group="video")
    guidance_scale_2: float | None = _setting(None, "of the low-noise expert", group="video")
    flow_shift: float | None = _setting(None, "of the noise schedule", group="video")
    boundary_ratio: float | None = _setting(
        None, "share of the timesteps at and above which the high-noise expert works", group="video"
    )
    seed: int | None = _setting(None, "unset: a random one, which is printed", group="video")
    num_outputs: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] = _setting(
        1, f"1 to {MAX_OUTPUTS} videos with consecutive seeds, each with a file of its own", group="video"
    )
    format: OutputFormat | None = _setting(None, "of the file; unset: mp4_h264", group="output")
    crf: int | None = _setting(
        None, "constant quality of a video codec, 0 is best; unset: the format's usual value", group="output"
    )
    bitrate_bps: int | None = _setting(None, "mean bits a second, instead of --crf", group="output")
    quality: int | None = _setting(None, "of JPEG and WebP, 1 to 100, 100 is best; unset: 90", group="output")
    pixel_format: PixelFormat | None = _setting(
        None, "how samples are stored; unset: the format's usual way", group="output"
    )
    save_output: bool = _setting(True, "write the video to a file; false: only compute it", group="output")
    output_path: ExpandedPath = _setting(Path("outputs"), "directory of the files", group="output")
    output_file_name: str | None = _setting(
        None,
        "unset: made from the prompt and the seed; with several outputs each has its seed in the name",
        group="output",
    )

    @classmethod
    def conflicts(cls, given: Collection[str]) -> Iterator[str]:
        if "prompt" not in given and "prompts_file" not in given:
            yield "--prompt or --prompts-file: one of them must be given"
        if "prompt" in given and "prompts_file" in given:
            yield "--prompt: not with --prompts-file, whose lines have a prompt each"
        if "output_file_name" in given and "prompts_file" in given:
            yield "--output-file-name: not with --prompts-file, whose lines may have an output_file_name each"
        if "size" in given and ("width" in given or "height" in given):
            yield "--size: not with --width or --height"
        if "crf" in given and "bitrate_bps" in given:
            yield "--crf: not with --bitrate-bps"


class ModelsSettings(Settings):
    """Print what a running server can do."""

    command = "models"

    address: str = _setting("127.0.0.1:3000", "HOST:PORT of the server", group="server")
    timeout_s: Seconds = _setting(10.0, "longest time to wait for its answer", group="server")


class JoinSettings(Settings):
    """Lend a rank of this host to a server on another host, until that server stops. torchrun starts several."""

    command = "join"

    address: HostPort | None = _setting(None, "HOST:PORT of the server's --join-address", group="server")
    secret_file: ExpandedPath | None = _setting(
        None, "file with what stands in the server's --join-secret-file", group="server"
    )
    node_rank: Count = _setting(
        1, "which of the hosts this is: 1 to --nnodes - 1, for 0 is the server's", group="ranks"
    )
    model_path: str | None = _setting(
        None,
        "where this host has the checkpoint; unset: under the path, the hub id or the name that the server has it from",
        group="ranks",
    )
    cache_dir: ExpandedPath = _setting(CACHE_DIR, "directory in which an embedded model is put together", group="ranks")
    give_up_after_s: SecondsOrNone = _setting(
        600.0, "end when the server cannot be reached for this time", group="server"
    )

    @classmethod
    def conflicts(cls, given: Collection[str]) -> Iterator[str]:
        for name in ("address", "secret_file"):
            if name not in given:
                yield f"{_flag(name)}: must be given"


def place_on_host(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Which rank of this host the process is to be, and how many there are: as torchrun says, else the only one.

    Raises:
        UsageError: it says something else.
    """
    environment = os.environ if environment is None else environment
    values = [environment.get(name, usual) for name, usual in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        given = f"LOCAL_RANK {values[0]} of LOCAL_WORLD_SIZE {values[1]}"
        raise UsageError([f"{given}: must be numbers as torchrun sets them"])
    return int(values[0]), int(values[1])


class MakeTinyModelSettings(Settings):
    """Write a tiny checkpoint with random weights, in the published layout of a task's model, to a directory."""

    command = "make-tiny-model"

    directory: CliPositionalArg[ExpandedPath] = Field(description="a new or empty directory")
    task: Literal["t2v", "i2v", "ti2v"] = _setting(
        "t2v",
        "of the model: t2v makes videos from text, i2v from images, ti2v from text with or without an image",
        group="model",
    )


COMMANDS: Final[tuple[type[Settings], ...]] = (
    ServeSettings,
    GenerateSettings,
    JoinSettings,
    ModelsSettings,
    MakeTinyModelSettings,
)

S = TypeVar("S", bound=Settings)


def load(settings: type[S], argv: Sequence[str], environment: Mapping[str, str] | None = None) -> S:
    """The settings of one command: flags before environment before configuration file before defaults.

    Raises:
        UsageError: naming every setting that is unknown or wrong.
        SystemExit: after `--help`.
    """
    environment = os.environ if environment is None else environment
    flags, problems = _read_flags(settings, argv)
    variables, unknown_variables = _read_environment(settings, environment)
    path = flags.get("config") or variables.get("config")
    keys, unknown_keys = _read_file(settings, Path(path)) if path else ({}, [])
    problems = [*problems, *unknown_variables, *unknown_keys]
    origins = {
        **{name: f"{path}: {name}" for name in keys},
        **{name: _variable(name) for name in variables},
        **{name: _flag(name) for name in flags},
    }
    values = {**keys, **variables, **flags}
    problems += settings.conflicts([name for name, value in values.items() if value is not None])
    try:
        loaded = settings(**values)
    except ValidationError as error:
        problems += [_sentence(detail, origins) for detail in error.errors(include_url=False)]
    if problems:
        raise UsageError(problems)
    return loaded


# ---- flags ----------------------------------------------------------------------------------------------------------


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError([message])


def _read_flags(settings: type[Settings], argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    unknown: list[str] = []

    def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
        found, rest = parser.parse_known_args(arguments)
        unknown.extend(rest)
        # argparse before Python 3.13 drops a value of `--` and leaves an empty list.
        return Namespace(**{name: "--" if value == [] else value for name, value in vars(found).items()})

    parser = _Parser(
        prog=f"wan-grpc {settings.command}",
        usage=f"%(prog)s {_usage(settings)}",
        description=settings.__doc__,
        epilog=textwrap.fill(
            f"--some-name VALUE is also {ENV_PREFIX}SOME_NAME=VALUE in the environment and `some_name: VALUE` in the "
            "file of --config. A flag wins over the environment, the environment over the file.",
            100,
        ),
        allow_abbrev=False,
    )
    source = CliSettingsSource[_Parser](
        settings,
        root_parser=parser,
        cli_parse_args=list(argv),
        parse_args_method=parse,
        add_argument_method=_argument_adder(settings),
        cli_hide_none_type=True,
        cli_kebab_case=True,
        formatter_class=None,
    )
    return source(), list(_unknown_flags(settings, unknown))


def _usage(settings: type[Settings]) -> str:
    required = [name.upper() for name, field in settings.model_fields.items() if field.is_required()]
    return " ".join([*required, "[--flag VALUE]..."])


def _group(settings: type[Settings], name: str) -> str | None:
    extra = settings.model_fields[name].json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else None


def _argument_adder(settings: type[Settings]) -> Callable[..., None]:
    """Puts every flag under the heading of its group, in words for people."""
    groups: dict[str, _ArgumentGroup] = {}

    def add(parser: ArgumentParser, *names: str, **options: Any) -> None:
        name = options.get("dest", names[0])
        group = _group(settings, name)
        if group is None:
            parser.add_argument(*names, **options)
            return
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        others = [_flag(other) for other, own in SYNONYMS.items() if own == name]
        groups[group].add_argument(*names, *others, **{**options, **_words(settings, name, options["metavar"])})

    return add


def _words(settings: type[Settings], name: str, type_name: str) -> dict[str, Any]:
    field = settings.model_fields[name]
    shown = f" (default: {field.default})" if field.default is not None else ""
    words: dict[str, Any] = {"help": f"{field.description}{shown}".replace("%", "%%"), "required": False}
    if field.annotation is bool or bool in get_args(field.annotation):  # --flag and --flag true mean the same
        return {**words, "nargs": "?", "const": "true", "metavar": "{true,false}"}
    for kind in get_args(field.annotation):
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return {**words, "metavar": "NAME", "help": f"{words['help']}; one of {', '.join(kind)}"}
    return {**words, "metavar": "SECONDS" if name.endswith("_s") else _TYPE_WORDS.get(type_name, type_name)}


def _unknown_flags(settings: type[Settings], arguments: Sequence[str]) -> Iterator[str]:
    """One sentence for each; what follows an unknown flag is taken for its value."""
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        flag, is_flag = argument.partition("=")[0], argument.startswith("--")
        if is_flag:
            yield _unknown(flag, flag.removeprefix("--").replace("-", "_"), settings.model_fields, spell=_flag)
        elif not previous.startswith("--"):
            yield f"unexpected argument {argument!r}"


# ---- environment and file -------------------------------------------------------------------------------------------


def _read_environment(settings: type[Settings], environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values for this command. Those of other commands are known and left alone; an empty one counts as unset."""
    ours = {name: value for name, value in environment.items() if name.startswith(ENV_PREFIX) and value}
    given = {name: value for name, value in ours.items() if not _is_service_link(name, value)}
    known = _all_names()
    values, problems = {}, []
    for variable, value in given.items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        own = SYNONYMS.get(name, name)
        if own not in known or variable != _variable(name):
            problems.append(_unknown(variable, name, known, spell=_variable))
        elif own in settings.model_fields:
            values[own] = value
    return values, problems


def _is_service_link(variable: str, value: str) -> bool:
    is_linked_port = variable == _variable("port") and value.startswith(_LINKED_PORT)
    return is_linked_port or _SERVICE_LINK.fullmatch(variable) is not None


def _read_file(settings: type[Settings], path: Path) -> tuple[dict[str, Any], list[str]]:
    import yaml  # only those who have a file wait for it

    try:
        content = yaml.safe_load(_expanded(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError([f"{path}: cannot be read: {' '.join(str(error).split())}"]) from error
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        raise UsageError([f"{path}: is not a mapping of names to values"])
    known = _all_names()
    values = {SYNONYMS.get(key, key): value for key, value in content.items()}
    problems = [_unknown(f"{path}: {key}", str(key), known, spell=str) for key in values if key not in known]
    if "config" in content:
        problems.append(f"{path}: config: not for a file")
    return {key: value for key, value in values.items() if key in settings.model_fields}, problems


def _all_names() -> frozenset[str]:
    return frozenset(name for settings in COMMANDS for name in settings.model_fields)


# ---- words ----------------------------------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _unknown(given: str, name: str, known: Iterable[str], *, spell: Callable[[str], str]) -> str:
    name = SYNONYMS.get(name, name)
    if name in NOT_YET:
        return f"{given}: not served by this version yet"
    if name in _all_names() and name not in known:
        return f"{given}: a setting of another command"
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"{given}: unknown setting" + (f"; did you mean {spell(close[0])}?" if close else "")


def _sentence(detail: ErrorDetails, origins: Mapping[str, str]) -> str:
    name = str(detail["loc"][0])
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{origins.get(name, _flag(name))}: {message}, not {detail['input']!r}"
