"""Every way in which a generation is left before its end, and that nothing of it stays: ranks, memory, next video."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.functional.live import (
    MIB,
    OK,
    ROOT,
    LiveServer,
    Stream,
    environment,
    generate_request,
    kind,
    long_spec,
    spec,
    stage,
)
from wan_grpc.v1 import generation_pb2 as pb

RANK_BOUND_BYTES = 64 * MIB
"""The most by which the memory of a rank may be larger after a generation was left than it was before."""
LARGE = {"width": 320, "height": 256, "num_frames": 33, "num_inference_steps": 1}
"""A video whose decoding lasts."""
CLIENT = """
import sys, grpc
from wan_grpc.v1.video_generation_service_pb2 import GenerateRequest
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub
stub = VideoGenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
for answer in stub.Generate(GenerateRequest.FromString(bytes.fromhex(sys.argv[2]))):
    print(answer.event.generation, answer.event.WhichOneof("event"), flush=True)
"""


@pytest.fixture(scope="module")
def right(live: LiveServer) -> str:
    """The checksum of a small video, made when nothing had been left yet; shapes of all tests were computed before."""
    for larger in (spec(**LARGE), long_spec(num_inference_steps=1)):
        live.make(larger)
    return live.make(spec()).completed.sha256


@pytest.fixture(scope="module")
def held(live: LiveServer, right: str) -> list[int]:
    """Bytes that the ranks held between tests. Allocators give memory back when they like: the most is what counts."""
    return [live.rank_bytes()]


@pytest.fixture(autouse=True)
def _nothing_stays(live: LiveServer, right: str, held: list[int]) -> Iterator[None]:
    """After each test: the same ranks live, their memory is back, and the next video is right."""
    pids = live.rank_pids()
    held.append(live.rank_bytes())
    yield
    stream = live.make(spec())
    assert (live.rank_pids(), stream.completed.sha256) == (pids, right)
    assert hashlib.sha256(stream.video).hexdigest() == right
    assert live.rank_bytes() - max(held) < RANK_BOUND_BYTES


def new_prompt() -> str:
    """One that the ranks have not encoded before."""
    return f"A cat walks on the grass, {time.monotonic_ns()}"


def error(generation: pb.Generation) -> tuple[pb.GenerationState, str]:
    return generation.state, generation.error.reason


CANCELLED = (pb.GENERATION_STATE_CANCELLED, "CANCELLED_BY_CALLER")
ABANDONED = (pb.GENERATION_STATE_CANCELLED, "ABANDONED")
EXPIRED = (pb.GENERATION_STATE_CANCELLED, "DEADLINE_EXCEEDED")


# ---- CancelGeneration -----------------------------------------------------------------------------------------------


def cancel(live: LiveServer, stream: Stream) -> pb.Generation:
    """Cancel from a second call; the stream must say so."""
    cancelled = live.cancel(stream.name)
    told = stream.finish()
    assert (told.code, told.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED_BY_CALLER")
    assert told.metadata["generation_state"] == "CANCELLED"
    assert error(cancelled) == error(live.get(stream.name)) == CANCELLED
    return cancelled


def test_cancel_while_it_waits(live: LiveServer) -> None:
    """A generation that waits for its turn is cancelled at once, and the one that runs is not disturbed."""
    running, waiting = live.generate(long_spec(num_inference_steps=40)), live.generate(spec())
    running.until(stage(pb.STAGE_DENOISE))
    waiting.until(kind("queued"))
    assert not cancel(live, waiting).HasField("start_time")
    assert live.get(running.name).state == pb.GENERATION_STATE_RUNNING
    assert running.finish() == OK


def test_cancel_during_text(live: LiveServer) -> None:
    """A cancel while the prompt is encoded ends the generation before its first denoising step."""
    stream = live.generate(long_spec(prompt=new_prompt(), negative_prompt=new_prompt()))
    stream.until(stage(pb.STAGE_TEXT))
    assert (cancel(live, stream).progress.stage, stream.stages()) == (pb.STAGE_TEXT, [pb.STAGE_TEXT])


def test_cancel_during_denoising(live: LiveServer) -> None:
    """A cancel between the first and the last step ends the generation there."""
    stream = live.generate(long_spec())
    stream.until(stage(pb.STAGE_DENOISE, step=3))
    left = cancel(live, stream).progress
    assert (left.stage, 3 <= left.step < left.total_steps) == (pb.STAGE_DENOISE, True)


def test_cancel_during_decoding(live: LiveServer) -> None:
    """A cancel after the first pictures ends the generation before the last ones, and its bytes are not kept."""
    stream = live.generate(spec(**LARGE))
    stream.until(stage(pb.STAGE_DECODE, step=1))
    left = cancel(live, stream).progress
    assert (left.stage, 1 <= left.step < left.total_steps) == (pb.STAGE_DECODE, True)
    assert not list(live.spool_dir.glob(f"*/{stream.name.rpartition('/')[2]}*"))


def test_cancel_during_encoding(live: LiveServer) -> None:
    """A cancel when the ranks are done is either obeyed or too late; a video that was too far is whole and right."""
    video = spec(width=640, height=512, num_frames=5, num_inference_steps=1)
    whole = live.make(video).completed
    stream = live.generate(video)
    stream.until(stage(pb.STAGE_ENCODE))
    cancelled = live.cancel(stream.name)
    told = stream.finish()
    if told == OK:
        assert (cancelled.state, stream.completed.sha256) == (pb.GENERATION_STATE_SUCCEEDED, whole.sha256)
        assert hashlib.sha256(stream.video).hexdigest() == whole.sha256
    else:
        assert (told.reason, error(cancelled)) == ("CANCELLED_BY_CALLER", CANCELLED)


def test_cancel_twice(live: LiveServer) -> None:
    """A second cancel finds what the first left; one of a finished generation changes nothing."""
    stream = live.generate(long_spec())
    first = cancel(live, stream)
    done = live.make(spec())
    assert (live.cancel(stream.name), live.cancel(done.name)) == (first, live.get(done.name))


# ---- deadlines ------------------------------------------------------------------------------------------------------


def test_deadline_in_the_queue(live: LiveServer) -> None:
    """A generation whose call's deadline passes while it waits is cancelled, and never begins."""
    running, waiting = live.generate(long_spec()), live.generate(spec(), timeout_s=0.5)
    assert waiting.finish().code == grpc.StatusCode.DEADLINE_EXCEEDED
    left = live.ended(waiting.name)
    assert (error(left), left.HasField("start_time")) == (EXPIRED, False)
    cancel(live, running)


def test_deadline_while_denoising(live: LiveServer) -> None:
    """A generation whose call's deadline passes between steps is cancelled there."""
    live.make(long_spec(num_inference_steps=1))  # the prompt is known: the time goes to denoising
    stream = live.generate(long_spec(num_inference_steps=200), timeout_s=1.0)
    assert stream.finish().code == grpc.StatusCode.DEADLINE_EXCEEDED
    left = live.ended(stream.name)
    assert (error(left), left.progress.stage) == (EXPIRED, pb.STAGE_DENOISE)
    assert left.progress.step < left.progress.total_steps


def test_deadline_with_another_watcher(live: LiveServer) -> None:
    """When somebody else watches, the deadline of the call that began a generation does not end it."""
    stream = live.generate(long_spec(num_inference_steps=100), timeout_s=0.6)
    watcher = live.watch(stream.name)
    watcher.until(kind("accepted"))
    assert stream.finish().code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert live.get(stream.name).state == pb.GENERATION_STATE_RUNNING
    assert watcher.finish() == OK
    assert hashlib.sha256(watcher.video).hexdigest() == watcher.completed.sha256


def test_deadline_of_a_watcher(live: LiveServer) -> None:
    """The deadline of a WatchGeneration ends that call alone."""
    stream = live.generate(long_spec(num_inference_steps=30))
    watcher = live.watch(stream.name, timeout_s=0.3)
    assert watcher.finish().code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert stream.finish() == OK


def test_max_duration(live: LiveServer) -> None:
    """A generation that lasts longer than its max_duration is cancelled, and its stream says why."""
    stream = live.generate(long_spec(max_duration=Duration(seconds=1)))
    told = stream.finish()
    assert (told.code, told.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "MAX_DURATION_EXCEEDED")
    assert error(live.get(stream.name)) == (pb.GENERATION_STATE_CANCELLED, "MAX_DURATION_EXCEEDED")


# ---- streams that drop ----------------------------------------------------------------------------------------------


@contextmanager
def receiving_client(live: LiveServer, video: pb.GenerationSpec) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A client in a process of its own, to which chunks flow; and the name of its generation."""
    command = [sys.executable, "-c", CLIENT, live.address, generate_request(video).SerializeToString().hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as client:
        assert client.stdout is not None
        try:
            yield client, next(line.split()[0] for line in client.stdout if line.endswith(" chunk\n"))
        finally:
            client.kill()


def test_client_killed_without_grace(live: LiveServer) -> None:
    """A client that dies while chunks flow takes a generation with it that has no grace."""
    video = spec(**LARGE, output_format=pb.OUTPUT_FORMAT_RAW_RGB24, detach_grace=Duration())
    with receiving_client(live, video) as (client, name):
        client.kill()
        left = live.ended(name)
    assert (error(left), left.progress.step < left.progress.total_steps) == (ABANDONED, True)


def test_client_killed_within_the_grace(live: LiveServer) -> None:
    """By default a generation outlives its client for a while: it comes to its end, and its bytes can be had."""
    video = spec(**LARGE)
    expected = live.make(video).completed.sha256
    with receiving_client(live, video) as (client, name):
        client.kill()
        left = live.ended(name)
    assert (left.state, left.completed.sha256) == (pb.GENERATION_STATE_SUCCEEDED, expected)
    watcher = live.watch(name)
    assert (watcher.finish(), hashlib.sha256(watcher.video).hexdigest()) == (OK, expected)


def test_nobody_comes_back(live: LiveServer) -> None:
    """A generation that nobody watches any more is cancelled after its grace, not before."""
    stream = live.generate(long_spec(num_inference_steps=200, detach_grace=Duration(seconds=1)))
    stream.until(stage(pb.STAGE_DENOISE))
    dropped = time.time()
    stream.drop()
    left = live.ended(stream.name)
    assert (error(left), left.end_time.ToMilliseconds() / 1000 - dropped >= 0.99) == (ABANDONED, True)


def test_watched_again_in_time(live: LiveServer) -> None:
    """A watcher who comes within the grace sees every event and every byte that the dropped stream had not brought."""
    video = spec(**LARGE, output_format=pb.OUTPUT_FORMAT_RAW_RGB24, detach_grace=Duration(seconds=10))
    whole = live.make(video)
    stream = live.generate(video)
    stream.until(kind("chunk"))
    stream.drop()
    watcher = live.watch(stream.name, after=stream.last_sequence, from_offset=len(stream.video))
    assert watcher.finish() == OK
    assert stream.video + watcher.video == whole.video
    assert watcher.completed.sha256 == whole.completed.sha256
    sequences = [event.sequence for event in [*stream.events, *watcher.events] if not is_unnumbered(event)]
    assert sequences == sorted(set(sequences))
    assert {pb.STAGE_DECODE, pb.STAGE_ENCODE} >= set(watcher.stages())


def is_unnumbered(event: pb.GenerationEvent) -> bool:
    return event.WhichOneof("event") in ("chunk", "heartbeat")


def test_watched_after_the_end(live: LiveServer) -> None:
    """Whoever watches a generation that has ended gets what is asked for and then its end."""
    done = live.make(spec())
    half = len(done.video) // 2
    all_of_it, rest = live.watch(done.name), live.watch(done.name, after=done.last_sequence, from_offset=half)
    assert (all_of_it.finish(), rest.finish()) == (OK, OK)
    assert (all_of_it.video, rest.video) == (done.video, done.video[half:])
    assert rest.kinds() == ["chunk", "completed"]


def test_two_generations_left_at_once(live: LiveServer) -> None:
    """One connection that breaks detaches from all that it carried; without grace, both end."""
    channel = live.new_channel()
    streams = [live.generate(long_spec(detach_grace=Duration()), channel=channel) for _ in range(2)]
    names = [stream.name for stream in streams]
    channel.close()
    assert [error(live.ended(name)) for name in names] == [ABANDONED, ABANDONED]
