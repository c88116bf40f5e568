"""Readers that are slow and callers that are many."""

import asyncio
import hashlib
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration

from tests.functional.live import (
    MIB,
    OK,
    Ending,
    LiveServer,
    Stream,
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
NUM_STORM = 50
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


def leave_at_random(live: LiveServer, number: int, ways: list[str]) -> tuple[str, Stream]:
    """Begin a generation, and leave it in one of the ways after some of its events; its name and its stream."""
    chance = random.Random(number)
    way = chance.choice(ways)
    made = spec(seed=chance.choice(SEEDS), detach_grace=Duration())
    stream = live.generate(made, timeout_s=0.05 * chance.randrange(1, 20) if way == "deadline" else None)
    name = stream.name
    for _ in range(chance.randrange(12)):
        stream.take()
    if stream.ending is None and way == "cancel":
        live.cancel(name)
    if stream.ending is None and way == "drop":
        stream.drop()
    stream.finish()
    return name, stream


def test_storm(live: LiveServer) -> None:
    """Whatever many callers do to their generations at once, each ends once, and those that were wanted are right."""
    checksums = {live.make(spec(seed=seed)).completed.sha256 for seed in SEEDS}
    pids, before = live.rank_pids(), live.scrape()
    ways = ["finish", "cancel", "drop", "deadline"]
    with ThreadPoolExecutor(8) as pool:
        left = list(pool.map(lambda number: leave_at_random(live, number, ways), range(NUM_STORM)))
    assert len({name for name, _ in left}) == NUM_STORM
    ends = Counter(live.ended(name).state for name, _ in left)
    assert set(ends) == {pb.GENERATION_STATE_SUCCEEDED, pb.GENERATION_STATE_CANCELLED}
    finished = [stream for _, stream in left if stream.ending == OK]
    assert {hashlib.sha256(stream.video).hexdigest() for stream in finished} <= checksums
    after = live.scrape()
    outcomes = {"succeeded": pb.GENERATION_STATE_SUCCEEDED, "cancelled": pb.GENERATION_STATE_CANCELLED}
    for outcome, state in outcomes.items():
        counted = [scrape.value("wan_requests_total", outcome=outcome) for scrape in (before, after)]
        assert counted[1] - counted[0] == ends[state]
    eventually(lambda: live.scrape().value("wan_watchers") == 0)
    assert live.scrape().value("wan_queue_depth") == 0
    assert live.rank_pids() == pids
