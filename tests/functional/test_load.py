"""Readers that are slow and callers that are many."""

import asyncio
import hashlib
import time
from collections import Counter
from dataclasses import dataclass

import grpc

from tests.functional.live import (
    MIB,
    OK,
    Ending,
    LiveServer,
    ending,
    eventually,
    generate_request,
    kind,
    long_spec,
    spec,
    stage,
)
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

SERVER_BOUND_BYTES = 32 * MIB
"""The most by which the memory of the server may grow while somebody does not read."""
LARGE = spec(width=640, height=512, num_frames=21, num_inference_steps=2, output_format=pb.OUTPUT_FORMAT_RAW_RGB24)
LARGE_BYTES = 640 * 512 * 3 * 21
NUM_CALLS = 200
NUM_CHANNELS = 4
MAX_QUEUE = 16
SEEDS = (1, 2, 3, 4)
AT_ONCE_S = 2.0
"""How long the many callers of a full queue may wait for their refusal."""


def test_slow_reader(live: LiveServer) -> None:
    """Who does not read costs neither the memory of the server nor the time of the ranks, and misses nothing later."""
    expected = live.make(spec()).video
    live.make(LARGE)  # what the allocator keeps after such a video it has kept from now on
    sent, memory = live.scrape().value("wan_sent_bytes_total"), live.rss_bytes()
    slow = live.generate(LARGE, channel=live.new_channel())
    slow.until(kind("chunk"))
    assert live.make(spec()).video == expected
    highest = 0

    def note_memory_until_ended() -> bool:
        nonlocal highest
        highest = max(highest, live.rss_bytes())
        return live.get(slow.name).state == pb.GENERATION_STATE_SUCCEEDED

    eventually(note_memory_until_ended)
    unread = LARGE_BYTES - (live.scrape().value("wan_sent_bytes_total") - sent)
    assert unread > LARGE_BYTES / 2, "nothing was held back, so nothing is proved"
    print(f"{LARGE_BYTES} bytes of video, {unread:.0f} held back, the server grew by {highest - memory} bytes")
    assert highest - memory < SERVER_BOUND_BYTES
    assert slow.finish() == OK
    assert len(slow.video) == LARGE_BYTES
    assert hashlib.sha256(slow.video).hexdigest() == slow.completed.sha256
    assert slow.stages() == [pb.STAGE_TEXT, pb.STAGE_DENOISE, pb.STAGE_DECODE, pb.STAGE_ENCODE]
    assert (
        Counter(event.WhichOneof("event") for event in slow.events).items()
        >= dict.fromkeys(("accepted", "video_info", "completed"), 1).items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """One Generate, at its end."""

    ending: Ending
    seed: int
    name: str
    video: bytes
    took_s: float


async def call(stub: VideoGenerationServiceStub, seed: int) -> Called:
    began = time.monotonic()
    name, video, how = "", bytearray(), OK
    try:
        async for answer in stub.Generate(generate_request(spec(seed=seed))):
            name = answer.event.generation
            video += answer.event.chunk.data
    except grpc.aio.AioRpcError as error:
        how = ending(error)
    return Called(ending=how, seed=seed, name=name, video=bytes(video), took_s=time.monotonic() - began)


async def call_at_once(address: str) -> list[Called]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(NUM_CHANNELS)]
    for channel in channels:
        await channel.channel_ready()
    stubs = [VideoGenerationServiceStub(channel) for channel in channels]
    calls = [call(stubs[number % NUM_CHANNELS], SEEDS[number % len(SEEDS)]) for number in range(NUM_CALLS - 1)]
    ended = await asyncio.gather(*calls)
    for channel in channels:
        await channel.close()
    return ended


def test_two_hundred_callers(live: LiveServer) -> None:
    """Of 200 callers one runs, 16 wait and the rest are refused at once; all 17 get their own right video, once."""
    videos = {seed: bytes(live.make(spec(seed=seed)).video) for seed in SEEDS}
    assert len(set(videos.values())) == len(SEEDS)
    known = set(live.names())
    running = live.generate(long_spec())
    running.until(stage(pb.STAGE_DENOISE, step=1))
    calls = asyncio.run(call_at_once(live.address))
    assert running.finish() == OK
    accepted = [called for called in calls if called.ending == OK]
    refused = [called for called in calls if called.ending != OK]
    assert (len(accepted), len(refused)) == (MAX_QUEUE, NUM_CALLS - 1 - MAX_QUEUE)
    assert all(called.video == videos[called.seed] for called in accepted)
    endings = [called.ending for called in refused]
    assert {(how.code, how.reason) for how in endings} == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")}
    assert all(how.retry_after_s and how.retry_after_s > 0 for how in endings)
    slowest_s = max(called.took_s for called in refused)
    print(f"the last of {len(refused)} refusals came after {slowest_s:.2f} s")
    assert slowest_s < AT_ONCE_S
    names = {running.name, *(called.name for called in accepted)}
    assert len(names) == MAX_QUEUE + 1
    assert {live.get(name).state for name in names} == {pb.GENERATION_STATE_SUCCEEDED}
    assert set(live.names()) - known == names
    assert live.scrape().value("wan_queue_depth") == 0
