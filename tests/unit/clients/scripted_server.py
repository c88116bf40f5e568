"""A server that plays scripts: each stream is a list of what it sends and how it ends."""

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import google_crc32c
import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc.v1.video_generation_service_pb2_grpc import (
    VideoGenerationServiceServicer,
    add_VideoGenerationServiceServicer_to_server,
)

NAME = "generations/8d3f2a30-0000-4000-8000-000000000001"
DATA = bytes(range(256)) * 40
HALF = len(DATA) // 2
SHA256 = hashlib.sha256(DATA).hexdigest()
RESOLVED = pb.ResolvedSpec(
    prompt="a cat",
    width=64,
    height=48,
    num_frames=5,
    num_inference_steps=2,
    fps=8,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    flow_shift=12.0,
    boundary_ratio=0.875,
    seed=7,
    image_sha256="ab" * 32,
    image_fit=pb.IMAGE_FIT_COVER,
    output_format=pb.OUTPUT_FORMAT_MP4_H264,
    encoding=pb.EncodingOptions(crf=18, pixel_format=pb.PIXEL_FORMAT_YUV420P),
)


@dataclass(frozen=True, kw_only=True)
class End:
    """The stream ends in this status."""

    code: grpc.StatusCode
    message: str = "upstream reset"
    details: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Stay:
    """Nothing more is sent; the stream stays until somebody cancels the generation, or the call."""


Item: TypeAlias = "Message | End | Stay"


def event(sequence: int, **kind: Message) -> pb.GenerationEvent:
    return pb.GenerationEvent(sequence=sequence, time=Timestamp(seconds=1000 + sequence), generation=NAME, **kind)


def accepted() -> pb.GenerationEvent:
    return event(1, accepted=pb.Accepted(resolved=RESOLVED, warnings=["the prompt is long"]))


def progress(sequence: int, step: int) -> pb.GenerationEvent:
    return event(
        sequence,
        progress=pb.Progress(
            stage=pb.STAGE_DENOISE,
            step=step,
            total_steps=2,
            expert=pb.EXPERT_HIGH_NOISE,
            step_time=Duration(seconds=1, nanos=500_000_000),
            eta=Duration(seconds=3),
            slowest_rank=0,
            slowest_rank_time=Duration(seconds=1, nanos=250_000_000),
        ),
    )


def video_info(sequence: int) -> pb.GenerationEvent:
    info = pb.VideoInfo(
        output_format=pb.OUTPUT_FORMAT_MP4_H264, media_type="video/mp4", width=64, height=48, num_frames=5, fps=8
    )
    return event(sequence, video_info=info)


def chunk(sequence: int, begin: int, end: int, *, checksum: int | None = None) -> pb.GenerationEvent:
    data = DATA[begin:end]
    crc = google_crc32c.value(data) if checksum is None else checksum
    return event(sequence, chunk=pb.Chunk(offset=begin, data=data, crc32c=crc))


def completed(sequence: int, *, sha256: str = SHA256, size_bytes: int = len(DATA)) -> pb.GenerationEvent:
    return event(
        sequence,
        completed=pb.Completed(
            size_bytes=size_bytes,
            sha256=sha256,
            stage_times=[pb.StageTime(stage=pb.STAGE_TEXT, duration=Duration(nanos=250_000_000))],
            rank_memory=[pb.RankMemory(rank=0, peak_bytes=1234)],
        ),
    )


def error_info(reason: str, **metadata: str) -> Message:
    return error_details_pb2.ErrorInfo(reason=reason, domain="wan-grpc", metadata=metadata)


def retry_info(seconds: int, nanos: int = 0) -> Message:
    return error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos))


def bad_request(*violations: tuple[str, str, str]) -> Message:
    fields = [
        error_details_pb2.BadRequest.FieldViolation(field=field, description=description, reason=reason)
        for field, description, reason in violations
    ]
    return error_details_pb2.BadRequest(field_violations=fields)


def whole_video() -> list[Item]:
    return [
        accepted(),
        progress(2, 0),
        progress(3, 1),
        event(3, heartbeat=pb.Heartbeat()),
        video_info(4),
        chunk(4, 0, HALF),
        chunk(4, HALF, len(DATA)),
        completed(5),
    ]


CANCELLED = End(
    code=grpc.StatusCode.CANCELLED,
    message="the generation was cancelled",
    details=(error_info("CANCELLED_BY_CALLER", generation=NAME, generation_state="CANCELLED"),),
)


@dataclass
class ScriptedServer(VideoGenerationServiceServicer):
    """Plays `streams`, one a call, on a thread and loop of its own; keeps every request in `calls`."""

    streams: deque[Sequence[Item]] = field(default_factory=deque)
    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[Message] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    initial_metadata: tuple[tuple[str, str], ...] = ()
    address: str = ""

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._cancelled = asyncio.Event()
        self._server = grpc.aio.server()
        add_VideoGenerationServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def Generate(self, request: Message, context: Any) -> AsyncIterator[Message]:
        async for item in self._play(request, context):
            yield service_pb.GenerateResponse(event=item)

    async def WatchGeneration(self, request: Message, context: Any) -> AsyncIterator[Message]:
        async for item in self._play(request, context):
            yield service_pb.WatchGenerationResponse(event=item)

    async def DownloadVideo(self, request: Message, context: Any) -> AsyncIterator[Message]:
        async for item in self._play(request, context):
            yield item

    async def CancelGeneration(self, request: Message, context: Any) -> Message:
        self.calls.append(request)
        self._cancelled.set()
        state = pb.Generation(name=NAME, state=pb.GENERATION_STATE_CANCELLED)
        return service_pb.CancelGenerationResponse(generation=state)

    async def GetGeneration(self, request: Message, context: Any) -> Message:
        return await self._answer("GetGeneration", request, context)

    async def ListGenerations(self, request: Message, context: Any) -> Message:
        return await self._answer(f"ListGenerations {request.page_token}".strip(), request, context)

    async def DeleteGeneration(self, request: Message, context: Any) -> Message:
        return await self._answer("DeleteGeneration", request, context)

    async def GetModel(self, request: Message, context: Any) -> Message:
        return await self._answer("GetModel", request, context)

    async def _answer(self, method: str, request: Message, context: Any) -> Message:
        self._note(request, context)
        answer = self.answers[method]
        if isinstance(answer, End):
            await _end(answer, context)
        return answer

    async def _play(self, request: Message, context: Any) -> AsyncIterator[Message]:
        self._note(request, context)
        await context.send_initial_metadata(self.initial_metadata)
        for item in self.streams.popleft():
            if isinstance(item, Stay):
                await self._cancelled.wait()
                await _end(CANCELLED, context)
            elif isinstance(item, End):
                await _end(item, context)
            yield item

    def _note(self, request: Message, context: Any) -> None:
        self.calls.append(request)
        self.metadata.append(dict(context.invocation_metadata()))


async def _end(end: End, context: Any) -> None:
    if end.details:
        packed = [Packed() for _ in end.details]
        for any_message, detail in zip(packed, end.details, strict=True):
            any_message.Pack(detail)
        status = status_pb2.Status(code=end.code.value[0], message=end.message, details=packed)
        await context.abort(
            end.code, end.message, trailing_metadata=(("grpc-status-details-bin", status.SerializeToString()),)
        )
    await context.abort(end.code, end.message)
