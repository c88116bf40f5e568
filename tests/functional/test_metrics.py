"""The scrape of a real server: well formed, and right about what has happened."""

import shutil
import subprocess

import grpc

from tests.functional.live import OK, LiveServer, Scrape, eventually, long_spec, refusal, spec, stage
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1 import video_generation_service_pb2 as service_pb2

VIDEO = spec(num_frames=9, num_inference_steps=6)
HIGH, LOW = pb.EXPERT_HIGH_NOISE, pb.EXPERT_LOW_NOISE


def num_steps(live: LiveServer, expert: pb.Expert) -> int:
    """How many steps of VIDEO an expert computes, as the streams of two watchers tell."""
    events = live.make(VIDEO).events
    return sum(event.progress.expert == expert for event in events)


def test_promtool_has_no_complaint(live: LiveServer) -> None:
    """After traffic of every kind, `promtool check metrics` finds nothing to say about the scrape."""
    live.make(spec())
    refusal(lambda: live.stub.Generate(service_pb2.GenerateRequest()))
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not on PATH: `make promtool` brings it"
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=live.scrape().text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


def test_a_video_is_counted(live: LiveServer) -> None:
    """One video counts once: its steps by expert, its frames, its stages, its bytes as often as they were sent."""
    high, low = num_steps(live, HIGH), num_steps(live, LOW)
    assert (high > 0, low > 0) == (True, True)
    before = live.scrape()
    made = live.make(VIDEO)
    again = live.watch(made.name)
    assert again.finish() == OK
    after = live.scrape()
    assert grown(before, after, "wan_requests_total") == 1
    assert grown(before, after, "wan_requests_total", outcome="succeeded", reason="none") == 1
    steps = [grown(before, after, "wan_steps_total", expert=expert) for expert in ("high_noise", "low_noise")]
    assert steps == [high, low]
    timed = [grown(before, after, "wan_step_duration_seconds_count", expert=e) for e in ("high_noise", "low_noise")]
    assert timed == [high, low]
    assert grown(before, after, "wan_frames_total") == VIDEO.num_frames
    assert grown(before, after, "wan_sent_bytes_total") == 2 * len(made.video)
    for name in ("text", "denoise", "decode", "encode"):
        assert grown(before, after, "wan_stage_duration_seconds_count", stage=name) == 1
    assert grown(before, after, "wan_generation_duration_seconds_count", outcome="succeeded") == 1
    assert grown(before, after, "wan_queue_wait_seconds_count") == 1


def test_ends_are_counted_by_reason(live: LiveServer) -> None:
    """A cancelled and a refused request are counted as what they were, and as nothing else."""
    before = live.scrape()
    stream = live.generate(long_spec())
    stream.until(stage(pb.STAGE_DENOISE, step=1))
    live.cancel(stream.name)
    assert refusal(lambda: live.stub.Generate(service_pb2.GenerateRequest())).code == grpc.StatusCode.INVALID_ARGUMENT
    after = live.scrape()
    assert grown(before, after, "wan_requests_total") == 2
    assert grown(before, after, "wan_requests_total", outcome="cancelled", reason="CANCELLED_BY_CALLER") == 1
    assert grown(before, after, "wan_requests_total", outcome="refused", reason="INVALID_REQUEST") == 1


def test_gauges_follow(live: LiveServer) -> None:
    """Depth of the queue, running generations and watchers are told while they are, and are back at zero after."""
    running, waiting = live.generate(long_spec(num_inference_steps=30)), live.generate(spec())
    running.until(stage(pb.STAGE_DENOISE, step=1))
    busy = live.scrape()
    assert [busy.value(name) for name in ("wan_queue_depth", "wan_running_generations")] == [1, 1]
    assert busy.value("wan_watchers") == 2
    assert (running.finish(), waiting.finish()) == (OK, OK)
    idle = eventually(lambda: found if (found := live.scrape()).value("wan_watchers") == 0 else None)
    assert [idle.value(name) for name in ("wan_queue_depth", "wan_running_generations")] == [0, 0]


def test_ranks_and_model(live: LiveServer) -> None:
    """Each rank is up, with memory that its process really has; the model and its buckets are those of the service."""
    live.make(spec())
    found = live.scrape()
    assert found.value("wan_rank_up", rank="0") == found.value("wan_rank_up") == 1
    assert 0.5 < found.value("wan_rank_memory_bytes", rank="0") / live.rank_bytes() < 2
    assert found.value("wan_rank_peak_memory_bytes") >= found.value("wan_rank_memory_bytes") * 0.9
    assert found.value("wan_model_info", task="t2v", dtype="float32", world_size="1") == 1
    assert found.value("wan_model_load_seconds") > 0
    for name in ("wan_generation_duration_seconds", "wan_stage_duration_seconds", "wan_queue_wait_seconds"):
        assert found.value(f"{name}_bucket", le="3600.0") == found.value(f"{name}_count") > 0
