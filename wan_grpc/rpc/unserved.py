"""What the API has and this server has not, each with a sentence for the caller. GetModel repeats it."""

from collections.abc import Mapping
from types import MappingProxyType

from wan_grpc.v1.adapter_service_pb2 import DESCRIPTOR as ADAPTER_FILE

_NO_ADAPTERS = "this server loads no adapters"

UNSERVED_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "spec.adapters": _NO_ADAPTERS,
        "spec.acceleration_profile": "this server has no acceleration profiles: it always computes exactly",
    }
)
"""Path of each field in a request, and what it means that it is not served."""

UNSERVED_METHODS: Mapping[str, str] = MappingProxyType(
    {
        f"{service.full_name}/{method.name}": _NO_ADAPTERS
        for service in ADAPTER_FILE.services_by_name.values()
        for method in service.methods
    }
)
"""Full name of each method, and what it means that it is not served."""
