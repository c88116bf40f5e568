#!/usr/bin/env bash
# Writes the Python code of the API below a directory, by default this checkout, or checks what is committed:
#   protos/generate.sh [DIRECTORY]
#   protos/generate.sh --check
#
# The code must import on the oldest grpcio and protobuf that are supported and must not import google.api, so that
# stubs need nothing but those two: the annotations are for proxies and readers, and leave the descriptors here.
#   BUF         the buf to run (default: the one on PATH)
#   GEN_PYTHON  the Python of the generator's own environment (default: .venv-gen, made when missing)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
buf="${BUF:-buf}"
python="${GEN_PYTHON:-$root/.venv-gen/bin/python}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
image="$work/image.binpb"

main() {
  make_environment
  make_image
  if [ "${1:-}" = --check ]; then
    write_code "$work"
    cp "$root/wan_grpc/v1/__init__.py" "$work/wan_grpc/v1/"
    diff --recursive --unified --exclude=__pycache__ "$root/wan_grpc/v1" "$work/wan_grpc/v1" ||
      { echo "wan_grpc/v1 is not what the protos give: run protos/generate.sh" >&2; exit 1; }
  else
    mkdir -p "${1:-$root}"
    write_code "$(cd "${1:-$root}" && pwd)"
  fi
}

make_environment() {
  if "$python" -c 'import grpc_tools, mypy_protobuf' 2>/dev/null; then return; fi
  "${PYTHON:-python3}" -m venv "$root/.venv-gen"
  python="$root/.venv-gen/bin/python"
  # shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
  "$python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} -r "$root/protos/requirements.txt"
}

make_image() {
  "$buf" build "$root/protos" --as-file-descriptor-set --output "$image"
  "$python" - "$image" <<'PYTHON'
import pathlib
import sys

from google.protobuf.descriptor_pb2 import FileDescriptorSet

path = pathlib.Path(sys.argv[1])
files = FileDescriptorSet.FromString(path.read_bytes())
files.DiscardUnknownFields()  # the annotations: this process knows no google.api
for file in files.file:
    file.dependency[:] = [name for name in file.dependency if not name.startswith("google/api/")]
kept = [file for file in files.file if not file.name.startswith("google/api/")]
path.write_bytes(FileDescriptorSet(file=kept).SerializeToString())
PYTHON
}

write_code() {
  local output="$1"
  cd "$root/protos"
  protoc --python_out="$output" --pyi_out="$output" wan_grpc/v1/*.proto
  protoc --grpc_python_out="$output" --mypy_grpc_out="quiet:$output" wan_grpc/v1/*_service.proto
}

protoc() {
  PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc --descriptor_set_in="$image" "$@"
}

main "$@"
