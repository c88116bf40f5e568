import resource
import subprocess
import sys
from pathlib import Path

import pytest

from wan_grpc import __version__, cli, config
from wan_grpc.domain.errors import Reason, ServiceError, UnusableModelError
from wan_grpc.pipeline import tiny

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The version is one line on stdout."""
    assert (cli.main(arguments), capsys.readouterr().out) == (0, f"wan-grpc {__version__}\n")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists exactly the commands that have settings, and `version`."""
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("commands:\n")[2].partition("\n\n")[0].splitlines()
    assert {line.split()[0] for line in listed} == {kind.command for kind in config.COMMANDS} | {"version"}


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command the help goes to stderr and the exit code is 2."""
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()[0]) == ("", "usage: wan-grpc COMMAND [--flag VALUE]...")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command is named, with the one that was probably meant."""
    assert cli.main(["sevre"]) == 2
    assert capsys.readouterr().err == (
        "wan-grpc: 'sevre' is no command; did you mean serve?\n`wan-grpc --help` shows what it takes\n"
    )


def test_wrong_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Every wrong setting is a line on stderr, and the exit code is 2."""
    assert cli.main(["serve", "--prot", "1", "--port", "-2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "wan-grpc serve: --prot: unknown setting; did you mean --port?",
        "wan-grpc serve: --port: input should be greater than or equal to 0, not '-2'",
        "`wan-grpc serve --help` shows what it takes",
    ]


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UnusableModelError("/m is not whole"), 1, ["wan-grpc make-tiny-model: /m is not whole"]),
        (ServiceError(Reason.OUT_OF_MEMORY, "too large"), 1, ["wan-grpc make-tiny-model: too large"]),
        (OSError(13, "Permission denied", "/m"), 1, ["wan-grpc make-tiny-model: /m: Permission denied"]),
        (OSError("cannot listen"), 1, ["wan-grpc make-tiny-model: cannot listen"]),
        (
            config.UsageError(["--a: is wrong", "--b: is wrong"]),
            2,
            [
                "wan-grpc make-tiny-model: --a: is wrong",
                "wan-grpc make-tiny-model: --b: is wrong",
                "`wan-grpc make-tiny-model --help` shows what it takes",
            ],
        ),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_what_goes_wrong_is_a_sentence(
    error: BaseException,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What an operator can cause ends in a sentence and an exit code, never in a traceback."""

    def fail(directory: Path, **options: object) -> None:
        raise error

    monkeypatch.setattr(tiny, "make_tiny_model", fail)
    assert (cli.main(["make-tiny-model", "there"]), capsys.readouterr().err.splitlines()) == (code, lines)


def test_address_of_the_listening_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read one line with an address that clients take, IPv6 in brackets."""
    cli._say_address("127.0.0.1", 1)
    cli._say_address("::1", 2)
    assert capsys.readouterr().out == "listening on 127.0.0.1:1\nlistening on [::1]:2\n"


def test_models_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is not there is told in one line."""
    assert cli.main(["models", "--address", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wan-grpc models: 127.0.0.1:1: ") and line.endswith("(UNAVAILABLE)")


def test_without_the_server_extra() -> None:
    """Installed without [server], a command says what is to be installed, in one sentence."""
    code = "import sys; sys.modules['pydantic'] = None; from wan_grpc.cli import main; sys.exit(main(['serve']))"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "wan-grpc serve: pydantic is not installed; every command needs: pip install 'wan-grpc[server]'\n",
    )


def cpu_seconds(*arguments: str) -> float:
    """Processor time of a command from its start to its end: what it takes on a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["generate", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    """Help takes under half a second, process start included: the best of five, for other work slows all of them."""
    seconds = [cpu_seconds("-m", "wan_grpc.cli", *arguments) for _ in range(5)]
    assert min(seconds) < 0.5, seconds


def test_app_imports_no_torch() -> None:
    """The process that only launches and serves never loads torch, diffusers or transformers."""
    code = "import sys, wan_grpc.app; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
