from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wan_grpc import config
from wan_grpc.config import GenerateSettings, MakeTinyModelSettings, ServeSettings, Settings, UsageError, load
from wan_grpc.domain.formats import OutputFormat, PixelFormat
from wan_grpc.domain.images import ImageFit


def problems(settings: type[Settings], argv: list[str], environment: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(UsageError) as raised:
        load(settings, argv, environment or {})
    return raised.value.problems


def write(directory: Path, text: str) -> Path:
    path = directory / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_gives_the_defaults() -> None:
    """With no flag, variable or file, every setting has the default of its definition."""
    assert load(ServeSettings, [], {}) == ServeSettings()


def test_precedence(tmp_path: Path) -> None:
    """A flag wins over the environment, the environment over the file, the file over the default."""
    path = write(tmp_path, "port: 1\nmax_queue: 1\nheartbeat_s: 1\n")
    environment = {"WAN_GRPC_PORT": "2", "WAN_GRPC_MAX_QUEUE": "2"}
    loaded = load(ServeSettings, ["--config", str(path), "--port=3"], environment)
    assert loaded == ServeSettings(config=path, port=3, max_queue=2, heartbeat_s=1)


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    """WAN_GRPC_CONFIG names the file as --config does."""
    path = write(tmp_path, "host: '::1'\n")
    assert load(ServeSettings, [], {"WAN_GRPC_CONFIG": str(path)}) == ServeSettings(config=path, host="::1")


def test_the_same_value_by_each_way(tmp_path: Path) -> None:
    """Flag, variable and file key of one setting mean the same, whatever its type."""
    values: dict[str, Any] = {
        "device": "cpu",
        "num_gpus": 2,
        "drain_timeout_s": 0.5,
        "spool_dir": "/x",
        "model_path": "m",
    }
    path = write(tmp_path, "".join(f"{name}: {value}\n" for name, value in values.items()))
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    variables = {f"WAN_GRPC_{name.upper()}": str(value) for name, value in values.items()}
    by_file = load(ServeSettings, ["--config", str(path)], {}).model_copy(update={"config": None})
    wanted = ServeSettings(**values)
    assert (load(ServeSettings, flags, {}), load(ServeSettings, [], variables), by_file) == (wanted, wanted, wanted)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--save-output"], True),
        (["--save-output", "true"], True),
        (["--save-output", "false"], False),
        (["--save-output=no"], False),
        ([], True),
    ],
)
def test_booleans(argv: list[str], wanted: bool) -> None:
    """A boolean flag stands alone or takes a value."""
    assert load(GenerateSettings, ["--prompt", "p", *argv], {}).save_output is wanted


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], None),
        (["--enable-cfg-parallel"], True),
        (["--enable-cfg-parallel", "--num-gpus", "4"], True),
        (["--enable-cfg-parallel", "true"], True),
        (["--enable-cfg-parallel", "false"], False),
        (["--enable-cfg-parallel=false"], False),
    ],
)
def test_a_boolean_that_may_be_left_open(argv: list[str], wanted: bool | None) -> None:
    """It is given like any boolean flag, and says nothing when it is not."""
    assert load(ServeSettings, argv, {}).enable_cfg_parallel is wanted


@pytest.mark.parametrize("settings", [ServeSettings, GenerateSettings])
def test_the_flags_of_many_ranks(settings: type[ServeSettings | GenerateSettings], tmp_path: Path) -> None:
    """They are spelled as in SGLang, bare and with an equals sign, and go by each way."""
    given: dict[str, Any] = {
        "num_gpus": 8,
        "replicas": 2,
        "enable_cfg_parallel": True,
        "sp_degree": 2,
        "ulysses_degree": 2,
        "ring_degree": 1,
        "tp_size": 4,
    }
    prompt = {"prompt": "p"} if settings is GenerateSettings else {}
    wanted = settings(**given, **prompt)
    flags = ["--num-gpus", "8", "--replicas=2", "--enable-cfg-parallel", "--sp-degree", "2", "--ulysses-degree=2"]
    more = ["--ring-degree=1", "--tp-size=4", *(f"--prompt={text}" for text in prompt.values())]
    variables = {f"WAN_GRPC_{name.upper()}": str(value) for name, value in {**given, **prompt}.items()}
    path = write(tmp_path, "".join(f"{name}: {value}\n" for name, value in {**given, **prompt}.items()))
    by_file = load(settings, [f"--config={path}"], {}).model_copy(update={"config": None})
    assert (load(settings, [*flags, *more], {}), load(settings, [], variables), by_file) == (wanted,) * 3


@settings(deadline=None)
@example("--")
@given(st.text(alphabet=st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_text_arrives_as_it_was_typed(text: str) -> None:
    """No text is taken for a number, a list, null or nothing: a prompt is what was typed."""
    loaded = load(GenerateSettings, [f"--prompt={text}", f"--negative-prompt={text}"], {})
    assert (loaded.prompt, loaded.negative_prompt) == (text, text)


def test_enumerations_by_their_names() -> None:
    """An enumeration is given by the value that the help shows."""
    flags = ["--prompt=p", "--format", "raw_rgb24", "--image-fit=cover", "--pixel-format=yuv444p10"]
    assert load(GenerateSettings, flags, {}) == GenerateSettings(
        prompt="p",
        format=OutputFormat.RAW_RGB24,
        image_fit=ImageFit.COVER,
        pixel_format=PixelFormat.YUV444P10,
    )


def test_settings_by_their_other_names(tmp_path: Path) -> None:
    """A name that a setting goes by elsewhere is taken by each way, and means the same."""
    path = write(tmp_path, "prompt: p\nimage_path: a.png\noutput_format: gif\n")
    wanted = GenerateSettings(prompt="p", image=Path("a.png"), format=OutputFormat.GIF)
    flags = ["--prompt=p", "--image-path=a.png", "--output-format=gif"]
    variables = {"WAN_GRPC_PROMPT": "p", "WAN_GRPC_IMAGE_PATH": "a.png", "WAN_GRPC_OUTPUT_FORMAT": "gif"}
    by_file = load(GenerateSettings, [f"--config={path}"], {}).model_copy(update={"config": None})
    assert (load(GenerateSettings, flags, {}), load(GenerateSettings, [], variables), by_file) == (wanted,) * 3
    assert problems(ServeSettings, ["--image-path=a.png"], {"WAN_GRPC_image_path": "x"}) == (
        "--image-path: a setting of another command",
        "WAN_GRPC_image_path: unknown setting; did you mean WAN_GRPC_IMAGE?",
    )


@pytest.mark.parametrize("text", ["832x480", "832*480"])
def test_sizes(text: str) -> None:
    """A size is WIDTHxHEIGHT, the cross or the star between them."""
    assert load(GenerateSettings, ["--prompt=p", f"--size={text}"], {}).size == text


@pytest.mark.parametrize(
    "text", ["832", "832x", "x480", "-1x2", "832 x 480", "832x480x3", "1e3x5", "", "8٣x4", "1234567890x1"]
)
def test_what_is_no_size(text: str) -> None:
    """Anything else is refused with an example of what is wanted."""
    assert problems(GenerateSettings, ["--prompt=p", f"--size={text}"]) == (
        f"--size: must be WIDTHxHEIGHT such as 832x480, not {text!r}",
    )


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("max_area", 2**31 - 1),
        ("max_num_frames", 2**31 - 1),
        ("max_inference_steps", 2**31 - 1),
        ("max_prompt_bytes", 2**20),
        ("max_image_bytes", 2**28),
        ("max_image_pixels", 2**31 - 1),
        ("max_queue", 2**31 - 1),
    ],
)
def test_limits_are_what_get_model_can_tell(name: str, most: int) -> None:
    """Each limit goes up to what the API's field or a message of gRPC holds, and no further."""
    flag = f"--{name.replace('_', '-')}"
    assert getattr(load(ServeSettings, [f"{flag}={most}"], {}), name) == most
    assert problems(ServeSettings, [f"{flag}={most + 1}"]) == (
        f"{flag}: input should be less than or equal to {most}, not '{most + 1}'",
    )


@pytest.mark.parametrize("count", ["0", "9"])
def test_number_of_outputs(count: str) -> None:
    """One to eight videos come of one command."""
    (problem,) = problems(GenerateSettings, ["--prompt=p", f"--num-outputs={count}"])
    assert problem.startswith("--num-outputs: input should be ")
    assert [load(GenerateSettings, ["--prompt=p", f"--num-outputs={n}"], {}).num_outputs for n in (1, 8)] == [1, 8]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "--prompt or --prompts-file: one of them must be given"),
        (["--prompt=p", "--prompts-file=x"], "--prompt: not with --prompts-file, whose lines have a prompt each"),
        (
            ["--prompts-file=x", "--output-file-name=y"],
            "--output-file-name: not with --prompts-file, whose lines may have an output_file_name each",
        ),
        (["--prompt=p", "--size=1x1", "--width=1"], "--size: not with --width or --height"),
        (["--prompt=p", "--size=1x1", "--height=1"], "--size: not with --width or --height"),
        (["--prompt=p", "--crf=1", "--bitrate-bps=1"], "--crf: not with --bitrate-bps"),
    ],
)
def test_what_does_not_go_together(argv: list[str], wanted: str, tmp_path: Path) -> None:
    """Settings that exclude each other are refused, together with every wrong value."""
    assert problems(GenerateSettings, [*argv, "--seed=x"]) == (
        wanted,
        "--seed: input should be a valid integer, unable to parse string as an integer, not 'x'",
    )


def test_nothing_in_a_file_is_nothing(tmp_path: Path) -> None:
    """A key without a value neither gives a setting nor stands in the way of another."""
    path = write(tmp_path, "prompt: p\nprompts_file:\nsize:\nwidth: 16\n")
    assert load(GenerateSettings, [f"--config={path}"], {}) == GenerateSettings(config=path, prompt="p", width=16)


def test_positional_argument() -> None:
    """make-tiny-model takes its directory without a flag."""
    assert load(MakeTinyModelSettings, ["there"], {}) == MakeTinyModelSettings(directory=Path("there"))


@pytest.mark.parametrize("link", ["tcp://10.0.0.1:3000", "udp://10.0.0.1:3000", "sctp://10.0.0.1:3000"])
def test_service_links_are_no_settings(link: str) -> None:
    """What Kubernetes tells a pod about a Service named wan-grpc is passed over; a port that we are given is not."""
    environment = {
        "WAN_GRPC_SERVICE_HOST": "10.0.0.1",
        "WAN_GRPC_SERVICE_PORT": "3000",
        "WAN_GRPC_SERVICE_PORT_GRPC": "3000",
        "WAN_GRPC_PORT": link,
        "WAN_GRPC_PORT_3000_TCP": link,
        "WAN_GRPC_PORT_3000_TCP_PROTO": "tcp",
        "WAN_GRPC_PORT_3000_TCP_PORT": "3000",
        "WAN_GRPC_PORT_3000_TCP_ADDR": "10.0.0.1",
    }
    assert load(ServeSettings, [], environment) == ServeSettings()
    assert load(ServeSettings, [], {**environment, "WAN_GRPC_PORT": "4000"}) == ServeSettings(port=4000)
    assert problems(ServeSettings, [], {"WAN_GRPC_PORT_X": "1", "WAN_GRPC_PORT": "http://x"}) == (
        "WAN_GRPC_PORT_X: unknown setting; did you mean WAN_GRPC_PORT?",
        "WAN_GRPC_PORT: input should be a valid integer, unable to parse string as an integer, not 'http://x'",
    )


def test_every_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home of the user in every path, by flag, by variable, in a file and in a default."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "cache_dir: ~/cache\n")
    wanted = ServeSettings(
        config=tmp_path / "settings.yaml", cache_dir=tmp_path / "cache", spool_dir=tmp_path / "spool"
    )
    assert load(ServeSettings, ["--config=~/settings.yaml", "--spool-dir=~/spool"], {}) == wanted
    assert load(ServeSettings, ["--spool-dir=~/spool"], {"WAN_GRPC_CONFIG": "~/settings.yaml"}) == wanted
    assert load(GenerateSettings, ["--prompt=p", "--output-path=~/out"], {}).output_path == tmp_path / "out"
    assert load(GenerateSettings, ["--prompt=p"], {}).cache_dir == tmp_path / ".cache/wan-grpc"
    assert load(MakeTinyModelSettings, ["~/tiny"], {}).directory == tmp_path / "tiny"


def test_a_home_that_nobody_has() -> None:
    """A path below the home of a user who does not exist is refused, and not made in the current directory."""
    assert problems(ServeSettings, ["--spool-dir=~nobody-at-all/x"]) == (
        "--spool-dir: ~nobody-at-all is nobody's home, not '~nobody-at-all/x'",
    )
    assert problems(ServeSettings, ["--config=~nobody-at-all/x"]) == (
        "~nobody-at-all/x: cannot be read: ~nobody-at-all is nobody's home",
    )


def test_every_unknown_name_is_refused_at_once(tmp_path: Path) -> None:
    """Unknown flags, variables and file keys are all named, with the nearest known name."""
    path = write(tmp_path, "max_queu: 3\nconfig: x\nprompt: of another command\n")
    environment = {"WAN_GRPC_HOTS": "x", "WAN_GRPC_PROMPT": "of another command", "OTHER": "x"}
    assert problems(ServeSettings, [f"--config={path}", "--prot", "3", "--prompt", "p", "stray"], environment) == (
        "--prot: unknown setting; did you mean --port?",
        "--prompt: a setting of another command",
        "unexpected argument 'stray'",
        "WAN_GRPC_HOTS: unknown setting; did you mean WAN_GRPC_HOST?",
        f"{path}: max_queu: unknown setting; did you mean max_queue?",
        f"{path}: config: not for a file",
    )


def test_every_wrong_value_is_named_where_it_was_given(tmp_path: Path) -> None:
    """A wrong value is reported under the flag, variable or key that brought it, with its bound."""
    path = write(tmp_path, "port: 70000\n")
    environment = {"WAN_GRPC_HEARTBEAT_S": "16", "WAN_GRPC_PORT": ""}
    assert problems(ServeSettings, [f"--config={path}", "--device", "tpu", "--num-gpus=0"], environment) == (
        "--device: input should be 'auto', 'cuda' or 'cpu', not 'tpu'",
        "--num-gpus: input should be greater than or equal to 1, not '0'",
        f"{path}: port: input should be less than or equal to 65535, not 70000",
        "WAN_GRPC_HEARTBEAT_S: input should be less than or equal to 15, not '16'",
    )


@pytest.mark.parametrize("name", sorted(config.NOT_YET))
def test_settings_of_later_versions(name: str, tmp_path: Path) -> None:
    """What Wan2.2 servers are known to take and this version does not is refused as that, by each way."""
    flag, variable, path = f"--{name.replace('_', '-')}", f"WAN_GRPC_{name.upper()}", write(tmp_path, f"{name}: 1\n")
    assert problems(ServeSettings, [f"{flag}=2", f"--config={path}"], {variable: "true"}) == (
        f"{flag}: not served by this version yet",
        f"{variable}: not served by this version yet",
        f"{path}: {name}: not served by this version yet",
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- a\n", "is not a mapping of names to values"),
        ("a: [\n", "cannot be read: while parsing a flow node"),
        (None, "cannot be read: [Errno 2] No such file or directory"),
    ],
)
def test_unusable_file(text: str | None, wanted: str, tmp_path: Path) -> None:
    """A file that is missing, no YAML or no mapping is refused with its name and the reason."""
    path = tmp_path / "none.yaml" if text is None else write(tmp_path, text)
    (problem,) = problems(ServeSettings, [f"--config={path}"])
    assert problem.startswith(f"{path}: {wanted}")


def test_what_must_be_given() -> None:
    """An argument without a default is asked for."""
    assert problems(MakeTinyModelSettings, []) == ("the following arguments are required: DIRECTORY",)


def test_flag_without_its_value() -> None:
    """A flag that ends the line without its value is named."""
    assert problems(ServeSettings, ["--port"]) == ("argument --port: expected one argument",)


def test_no_abbreviations() -> None:
    """Half a flag is no flag: a later version may have another with the same beginning."""
    assert problems(ServeSettings, ["--max-q", "3"]) == ("--max-q: unknown setting; did you mean --max-queue?",)


def test_a_variable_is_spelled_in_capitals() -> None:
    """A variable in other letters is refused, for the next shell would not see it."""
    assert problems(ServeSettings, [], {"WAN_GRPC_port": "1"}) == (
        "WAN_GRPC_port: unknown setting; did you mean WAN_GRPC_PORT?",
    )


@pytest.mark.parametrize("settings", config.COMMANDS)
def test_help_names_every_setting(settings: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows each setting of the command with its description, and exits with 0."""
    with pytest.raises(SystemExit) as left:
        load(settings, ["--help"], {})
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    missing = [
        name
        for name, field in settings.model_fields.items()
        if (f"--{name.replace('_', '-')}" not in shown and name.upper() not in shown)
        or (field.description or "?").split()[0] not in words
    ]
    assert (left.value.code, missing) == (0, [])


def test_settings_do_not_change() -> None:
    """Loaded settings are frozen."""
    with pytest.raises(ValueError, match="frozen"):
        load(ServeSettings, [], {}).port = 1  # type: ignore[misc]
