import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from wan_grpc.v1 import generation_pb2 as _generation_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Adapter(_message.Message):
    __slots__ = ("name", "source", "weight_name", "expert", "default_scale", "applied_by_default", "rank", "size_bytes", "load_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_NAME_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SCALE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_BY_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    weight_name: str
    expert: _generation_pb2.Expert
    default_scale: float
    applied_by_default: bool
    rank: int
    size_bytes: int
    load_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., weight_name: _Optional[str] = ..., expert: _Optional[_Union[_generation_pb2.Expert, str]] = ..., default_scale: _Optional[float] = ..., applied_by_default: bool = ..., rank: _Optional[int] = ..., size_bytes: _Optional[int] = ..., load_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
