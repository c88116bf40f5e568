import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
BUF = Path(sysconfig.get_path("scripts")) / "buf"
STATUS_NAMES = {code.name for code in grpc.StatusCode}
SERVICE_FIELD, METHOD_FIELD = 6, 2  # field numbers on the path of a source location


def buf(*args: str, cwd: Path = PROTOS) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    return buf("breaking", "--against", "baseline.binpb", cwd=protos)


def method_comments(tmp_path: Path) -> dict[str, str]:
    image = tmp_path / "image.binpb"
    assert buf("build", "--as-file-descriptor-set", "--output", str(image)).returncode == 0
    return {
        file.service[0].method[location.path[3]].name: location.leading_comments
        for file in FileDescriptorSet.FromString(image.read_bytes()).file
        if file.package == "wan_grpc.v1"
        for location in file.source_code_info.location
        if len(location.path) == 4 and (location.path[0], location.path[2]) == (SERVICE_FIELD, METHOD_FIELD)
    }


def test_protos_are_lint_clean() -> None:
    """The API keeps buf's STANDARD and COMMENTS rules: every message, field, value and method has a comment."""
    done = buf("lint")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_protos_are_formatted() -> None:
    """The protos are written the way buf formats them."""
    done = buf("format", "--diff", "--exit-code", "--path", "wan_grpc")
    assert (done.returncode, done.stdout) == (0, "")


def test_protos_break_nobody() -> None:
    """Whoever was built against the last release can still talk to this one."""
    done = breaking(PROTOS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("generation", r"  optional int32 width = 3 [^\n]*\n", "", 'field "3" with name "width" on message'),
        (
            "generation",
            "optional int32 height = 4",
            "optional string height = 4",
            'changed type from "int32" to "string"',
        ),
        ("generation", "Chunk chunk = 16", "Chunk chunk = 19", 'field "16" with name "chunk" on message'),
        ("video_generation_service", r"  rpc GetModel\(.*?\n  }\n", "", 'RPC "GetModel" on service'),
        ("adapter_service", r"returns \(ListAdaptersResponse\)", "returns (stream ListAdaptersResponse)", "streaming"),
    ],
    ids=["field removed", "type changed", "number changed", "method removed", "method streams"],
)
def test_a_breaking_edit_is_found(tmp_path: Path, file: str, old: str, new: str, complaint: str) -> None:
    """An edit that would break callers does not pass."""
    protos = shutil.copytree(PROTOS, tmp_path / "protos")
    edited = protos / f"wan_grpc/v1/{file}.proto"
    text, times = re.subn(old, new, edited.read_text(), count=1, flags=re.DOTALL)
    edited.write_text(text)
    done = breaking(protos)
    assert times == 1
    assert done.returncode != 0
    assert complaint in done.stdout


def test_generated_code_is_what_the_protos_give() -> None:
    """Nobody edited the generated code, and nobody forgot to generate it."""
    done = subprocess.run(
        [PROTOS / "generate.sh", "--check"],
        env={**os.environ, "BUF": str(BUF), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_generated_code_needs_grpc_and_protobuf_alone() -> None:
    """The stubs import nothing but what the client's two dependencies bring: no google.api, no google.rpc."""
    code = "".join(path.read_text() for path in sorted((ROOT / "wan_grpc/v1").glob("*.py")))
    imported = set(re.findall(r"^ *(?:from|import) (\S+)", code, flags=re.MULTILINE))
    assert imported == {
        "google.protobuf",
        "google.protobuf.internal",
        "grpc",
        "grpc._utilities",
        "warnings",
        "wan_grpc.v1",
    }
    program = (
        "import sys\n"
        "import wan_grpc.v1.adapter_service_pb2_grpc, wan_grpc.v1.video_generation_service_pb2_grpc\n"
        "print(sorted(name for name in sys.modules if name.startswith(('google.api', 'google.rpc'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_generated_code_runs_on_the_oldest_supported_releases() -> None:
    """The generated code asks for no newer grpcio or protobuf than the package does."""
    project = (ROOT / "pyproject.toml").read_text()
    grpcio = re.search(r'"grpcio>=([\d.]+)', project)
    protobuf = re.search(r'"protobuf>=([\d.]+)', project)
    code = "".join(path.read_text() for path in sorted((ROOT / "wan_grpc/v1").glob("*.py")))
    asked_grpcio = set(re.findall(r"GRPC_GENERATED_VERSION = '(\d+\.\d+)\.0'", code))
    asked_protobuf = set(re.findall(r"Protobuf Python Version: ([\d.]+)", code))
    assert grpcio
    assert protobuf
    assert (asked_grpcio, asked_protobuf) == ({grpcio[1]}, {protobuf[1]})


def test_no_retry_is_promised_for_a_full_disk(tmp_path: Path) -> None:
    """Trying again does not make room: only the methods that meet the disk name it, and they send to the operator."""
    advice = {
        name: " ".join(comment.partition("STORAGE_FAILED)")[2].split())[: len(", ask the operator.")]
        for name, comment in method_comments(tmp_path).items()
        if "STORAGE_FAILED" in comment
    }
    assert advice == {
        "Generate": ", ask the operator.",
        "WatchGeneration": ", ask the operator.",
        "DownloadVideo": "; ask the operator.",
    }


def test_every_method_lists_its_statuses(tmp_path: Path) -> None:
    """Each method's comment names the statuses it can end in, and what to do about each."""
    endings = {
        name: dict(re.findall(r"^ ([A-Z_]+): (\S.*)$", comment.partition("Ends in:\n")[2], flags=re.MULTILINE))
        for name, comment in method_comments(tmp_path).items()
    }
    assert len(endings) == 12
    for name, statuses in endings.items():
        assert statuses.keys() <= STATUS_NAMES, name
        assert statuses.keys() >= {"OK", "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE", "INTERNAL"}, name
        assert ("INVALID_ARGUMENT" in statuses) == (name != "GetModel"), name
