import subprocess
import sys

ONLY_WHAT_PIP_INSTALLS = """
import sys

ALLOWED = ("google.protobuf", "google._upb", "grpc", "typing_extensions", "wan_grpc.v1", "wan_grpc_client")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        is_allowed = any(name == one or name.startswith(one + ".") or one.startswith(name + ".") for one in ALLOWED)
        if not is_allowed and name.partition(".")[0] not in sys.stdlib_module_names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import wan_grpc_client, wan_grpc_client.cli
from wan_grpc_client.crc32c import crc32c
from wan_grpc_client.details import read_details
assert crc32c(b"123456789") == 0xE3069283
assert read_details(b"").reason == ""
"""


def test_the_client_needs_grpcio_and_protobuf_alone() -> None:
    """With every other import refused the client comes up, and verifies checksums without google_crc32c."""
    done = subprocess.run(
        [sys.executable, "-c", ONLY_WHAT_PIP_INSTALLS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_error_details_do_not_clash_with_googleapis() -> None:
    """A process may use googleapis-common-protos before and after the client has read details."""
    code = """
from google.rpc import status_pb2
from wan_grpc_client.details import read_details
assert read_details(b"").reason == ""
from google.rpc import error_details_pb2
info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="wan-grpc", metadata={"generation": "generations/a"})
status = status_pb2.Status()
status.details.add().Pack(info)
details = read_details(status.SerializeToString())
assert (details.reason, dict(details.metadata)) == ("QUEUE_FULL", {"generation": "generations/a"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
