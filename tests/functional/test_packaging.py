import json
import os
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def succeed(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts directory of an environment into which only `pip install wan-grpc` was said."""
    directory = tmp_path_factory.mktemp("environment")
    succeed(sys.executable, "-m", "venv", directory)
    pip_arguments = os.environ.get("PIP_ARGS", "").split()
    constraints = ROOT / "constraints.txt"
    succeed(directory / "bin/pip", "install", "--quiet", *pip_arguments, "--constraint", constraints, wheel)
    return directory / "bin"


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    """The wheel has the service, the client, the protos, the marks of typed packages, and no tests."""
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {
        "wan_grpc/py.typed",
        "wan_grpc/app.py",
        "wan_grpc/v1/video_generation_service.proto",
        "wan_grpc/v1/video_generation_service_pb2.py",
        "wan_grpc_client/py.typed",
        "wan_grpc_client/client.py",
    }
    wanted |= {
        str(path.relative_to(ROOT)) for path in (ROOT / "wan_grpc/pipeline/wan_tiny").rglob("*") if path.is_file()
    }
    assert any(name.endswith(".safetensors") for name in wanted) and wheel.stat().st_size < 20e6
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert (wanted - set(names), top) == (set(), {"wan_grpc", "wan_grpc_client"})


def test_base_dependencies(wheel: Path) -> None:
    """Without an extra, nothing but grpcio and protobuf is asked for, each within bounds."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    base = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert (base, metadata["License-Expression"]) == (["grpcio<2,>=1.80", "protobuf<8,>=6.31.1"], "Apache-2.0")


def test_client_alone(environment: Path) -> None:
    """The client installs with grpcio and protobuf alone, and runs there: no torch, nothing of the server."""
    installed = {item["name"] for item in json.loads(succeed(environment / "pip", "list", "--format=json"))}
    assert installed - {"pip", "setuptools"} == {"grpcio", "protobuf", "typing_extensions", "wan-grpc"}
    code = (
        "import wan_grpc_client, wan_grpc.v1.video_generation_service_pb2_grpc; print(wan_grpc_client.Client.__name__)"
    )
    assert succeed(environment / "python", "-c", code) == "Client\n"
    assert "--prompt" in succeed(environment / "wan-grpc-client", "generate", "--help")


def test_server_command_says_what_is_missing(environment: Path) -> None:
    """Where only the client was installed, `wan-grpc serve` names the extra in one sentence."""
    done = run(environment / "wan-grpc", "serve")
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "wan-grpc serve: pydantic is not installed; every command needs: pip install 'wan-grpc[server]'\n",
    )
