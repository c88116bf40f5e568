import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog

from wan_grpc import cli
from wan_grpc.app import _other_hosts, refuse_wrong_hosts
from wan_grpc.config import JoinSettings, ServeSettings, UsageError, load, place_on_host, split_address
from wan_grpc.engine.joining import Hosts
from wan_grpc.engine.links import Endpoint

ROOT = Path(__file__).resolve().parents[2]
CONTENT = b"0123456789abcdef\n"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(CONTENT)
    path.chmod(0o600)
    return path


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("10.0.0.1:3001", ("10.0.0.1", 3001)),
        ("head.example:0", ("head.example", 0)),
        ("[fd00::1]:3001", ("fd00::1", 3001)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_addresses(text: str, wanted: tuple[str, int]) -> None:
    """A name, an IPv4 address or an IPv6 address in brackets, and a port."""
    assert split_address(text) == wanted


@pytest.mark.parametrize("text", ["10.0.0.1", ":3001", "10.0.0.1:", "host:x", "host:65536", "fd00::1:3001", "host:-1"])
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    """Both commands say which flag it was and what it should be."""
    for kind, flag in ((ServeSettings, "--join-address"), (JoinSettings, "--address")):
        with pytest.raises(UsageError) as raised:
            load(kind, [flag, text, "--config", "/dev/null"], {})
        assert f"{flag}: must be HOST:PORT such as 10.0.0.1:3001, not {text!r}" in raised.value.problems


def test_what_join_needs() -> None:
    """It must be told where the server is and what the secret is, and says both at once."""
    with pytest.raises(UsageError) as raised:
        load(JoinSettings, [], {})
    assert raised.value.problems == ("--address: must be given", "--secret-file: must be given")


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1)),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (0, 1)),
        ({"LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "8", "RANK": "15", "WORLD_SIZE": "16"}, (7, 8)),
    ],
)
def test_the_place_on_a_host_is_torchruns(environment: dict[str, str], wanted: tuple[int, int]) -> None:
    """Without torchrun a process is the only one of its host."""
    assert place_on_host(environment) == wanted


@pytest.mark.parametrize(("rank", "size"), [("1", "1"), ("x", "2"), ("-1", "2"), ("1", "")])
def test_a_place_that_cannot_be(rank: str, size: str) -> None:
    """What torchrun would never say is refused."""
    with pytest.raises(UsageError, match="must be numbers as torchrun sets them"):
        place_on_host({"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size})


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({}, []),
        ({"num_gpus": 4}, []),
        (
            {"nnodes": 2, "num_gpus": 2},
            [
                "--join-address: must be given when --nnodes is more than 1",
                "--join-secret-file: must be given when --nnodes is more than 1",
            ],
        ),
        (
            {"join_address": "10.0.0.1:1", "join_secret_file": "SECRET"},
            ["--join-address: only with --nnodes above 1", "--join-secret-file: only with --nnodes above 1"],
        ),
        ({"nnodes": 2, "num_gpus": 4, "join_address": "10.0.0.1:1", "join_secret_file": "SECRET"}, []),
        (
            {"nnodes": 2, "num_gpus": 3, "join_address": "10.0.0.1:1", "join_secret_file": "SECRET"},
            ["--num-gpus: 3 ranks are not as many on each of --nnodes 2"],
        ),
        (
            {"nnodes": 2, "num_gpus": 4, "replicas": 2, "join_address": "10.0.0.1:1", "join_secret_file": "SECRET"},
            ["--replicas: 2, but the ranks of --nnodes 2 are one group"],
        ),
        (
            {"nnodes": 2, "num_gpus": 2, "join_address": "10.0.0.1:1", "join_secret_file": "SHORT"},
            ["--join-secret-file: SHORT: must hold 16 to 4096 bytes"],
        ),
        (
            {"nnodes": 2, "num_gpus": 2, "join_address": "10.0.0.1:1", "join_secret_file": "OPEN"},
            ["--join-secret-file: OPEN: everybody on this host has access to it; `chmod o= OPEN` mends that"],
        ),
        (
            {"nnodes": 2, "num_gpus": 2, "join_address": "10.0.0.1:1", "join_secret_file": "MISSING"},
            ["--join-secret-file: MISSING: cannot be read: No such file or directory"],
        ),
    ],
)
def test_what_hosts_need(values: dict[str, Any], problems: list[str], tmp_path: Path) -> None:
    """Every fault in how ranks are spread over hosts is told at once, by the flag."""
    for name, content, mode in (("SECRET", CONTENT, 0o600), ("SHORT", b"short", 0o600), ("OPEN", CONTENT, 0o644)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(mode)
    if "join_secret_file" in values:
        values = {**values, "join_secret_file": tmp_path / values["join_secret_file"]}
    found: list[str] = []
    try:
        refuse_wrong_hosts(ServeSettings(**values))
    except UsageError as error:
        found = [problem.replace(f"{tmp_path}/", "") for problem in error.problems]
    assert found == problems


def test_a_server_listens_for_hosts_only_when_it_is_told_to(secret: Path) -> None:
    """With the address and the secret of its settings, at a port that the log tells, and never on every address."""
    values = {"nnodes": 2, "num_gpus": 4, "join_secret_file": secret}
    with _other_hosts(ServeSettings()) as hosts:
        assert hosts is None
    with (
        structlog.testing.capture_logs() as log,
        _other_hosts(ServeSettings(join_address="127.0.0.1:0", **values)) as hosts,
    ):
        assert hosts is not None
        assert (hosts.num_nodes, hosts.ranks_per_node, hosts.secret) == (2, 2, b"0123456789abcdef")
        told = [line["join_address"] for line in log if line["event"] == "listening for ranks of other hosts"]
        assert told == [str(hosts.at)]
    with (
        pytest.raises(UsageError, match=r"--join-address: must name one address of this host.*not '0\.0\.0\.0:0'"),
        _other_hosts(ServeSettings(join_address="0.0.0.0:0", **values)),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "problem"),
    [("192.0.2.1:0", "Cannot assign requested address"), ("nohost.invalid:0", "not known|failure")],
)
def test_an_address_that_cannot_be_had_is_told_by_the_flag(address: str, problem: str, secret: Path) -> None:
    """One that this host does not have, and a name that nobody knows, are wrong usage."""
    values: dict[str, Any] = {"nnodes": 2, "num_gpus": 4, "join_secret_file": secret, "join_address": address}
    with (
        pytest.raises(UsageError, match=f"--join-address: {address}: .*({problem})"),
        _other_hosts(ServeSettings(**values)),
    ):
        pass


def test_a_server_that_fails_does_not_say_goodbye(secret: Path) -> None:
    """Whatever ends it but peace, the other hosts are to look for the next one."""
    values: dict[str, Any] = {"nnodes": 2, "num_gpus": 4, "join_secret_file": secret, "join_address": "127.0.0.1:0"}
    with _other_hosts(ServeSettings(**values)) as hosts:
        assert hosts is not None
    assert hosts._is_at_peace
    with pytest.raises(OSError, match="the port is taken"), _other_hosts(ServeSettings(**values)) as hosts:
        raise OSError("the port is taken")
    assert hosts is not None and not hosts._is_at_peace


# ---- the command ----------------------------------------------------------------------------------------------------


def test_it_is_what_torchrun_can_start(secret: Path) -> None:
    """`-m wan_grpc.join` is `wan-grpc join`, and imports neither torch nor grpc before the server wants a rank."""
    program = (
        "import runpy, sys; sys.argv = ['join', '--address', '127.0.0.1:1', '--secret-file', sys.argv[1],"
        " '--give-up-after-s', '0']\n"
        "try: runpy.run_module('wan_grpc.join', run_name='__main__')\n"
        "except SystemExit as left: print(left.code, {'torch', 'grpc', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(secret)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1 set()\n"), done.stderr
    assert done.stderr.splitlines()[-1] == ("wan-grpc join: 127.0.0.1:1: not joined for 0 s: Connection refused")


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        ({"content": b"too short"}, 2, "wan-grpc join: --secret-file: {path}: must hold 16 to 4096 bytes"),
        (
            {"content": None},
            2,
            "wan-grpc join: --secret-file: {path}: cannot be read: No such file or directory",
        ),
        ({"content": b"another secret, of good length"}, 1, "wan-grpc join: the server at {at} knows another secret"),
        ({"node_rank": "2"}, 1, "wan-grpc join: node rank 2 is none of 1 to 1"),
    ],
)
def test_what_keeps_a_host_from_joining_is_a_sentence(
    change: dict[str, Any],
    code: int,
    line: str,
    secret: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends with a sentence and an exit code, never with a traceback, and does not try what is no use again."""
    monkeypatch.setattr("wan_grpc.telemetry.logs.configure", lambda **_: None)  # the log of the tests is theirs
    if (content := change.get("content", CONTENT)) is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
    at = Endpoint(host="127.0.0.1", port=0)
    with contextlib.closing(Hosts(at=at, secret=CONTENT.strip(), num_nodes=2, ranks_per_node=1)) as hosts:
        arguments = ["join", "--address", str(hosts.at), "--secret-file", str(secret)]
        arguments += ["--node-rank", change.get("node_rank", "1")]
        assert cli.main(arguments) == code
        wanted = line.format(path=secret, at=hosts.at)
    assert wanted in capsys.readouterr().err.splitlines()


def test_a_server_that_stops_lets_a_host_end_well(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0, so that torchrun does not start it again."""
    monkeypatch.setattr("wan_grpc.telemetry.logs.configure", lambda **_: None)
    monkeypatch.setattr("importlib.import_module", lambda name: None)  # no rank is wanted here
    at, codes = Endpoint(host="127.0.0.1", port=0), list[int]()
    hosts = Hosts(at=at, secret=CONTENT.strip(), num_nodes=2, ranks_per_node=1)
    arguments = ["join", "--address", str(hosts.at), "--secret-file", str(secret)]
    with structlog.testing.capture_logs() as log:
        thread = threading.Thread(target=lambda: codes.append(cli.main(arguments)))
        thread.start()
        while not any(line["event"] == "joined" for line in log):
            thread.join(0.01)
            assert thread.is_alive()
        hosts.close()
        thread.join(10)
    assert codes == [0]
