"""The Python client of wan-grpc: makes videos on a server and brings them back verified.

Needs grpcio and protobuf alone. `generate` and `generate_async` are all that most callers need.
"""

from wan_grpc_client.aio import AsyncClient, AsyncGeneration, generate_async
from wan_grpc_client.client import Client, Generation, generate
from wan_grpc_client.details import Violation
from wan_grpc_client.errors import (
    CorruptVideoError,
    DeadlineError,
    GenerationCancelledError,
    RefusedError,
    ServerError,
    TryAgainError,
    WanGrpcError,
)
from wan_grpc_client.events import (
    Accepted,
    Chunk,
    Completed,
    Ending,
    Event,
    GenerationStatus,
    Preview,
    Progress,
    Queued,
    RankMemory,
    Reattaching,
    Resolved,
    Resumed,
    StageTime,
    VideoInfo,
)
from wan_grpc_client.following import Download, Patience, Video
from wan_grpc_client.request import Options

__all__ = [
    "Accepted",
    "AsyncClient",
    "AsyncGeneration",
    "Chunk",
    "Client",
    "Completed",
    "CorruptVideoError",
    "DeadlineError",
    "Download",
    "Ending",
    "Event",
    "Generation",
    "GenerationCancelledError",
    "GenerationStatus",
    "Options",
    "Patience",
    "Preview",
    "Progress",
    "Queued",
    "RankMemory",
    "Reattaching",
    "RefusedError",
    "Resolved",
    "Resumed",
    "ServerError",
    "StageTime",
    "TryAgainError",
    "Video",
    "VideoInfo",
    "Violation",
    "WanGrpcError",
    "generate",
    "generate_async",
]
