import shutil
import subprocess
import urllib.request

import pytest

from wan_grpc.domain.errors import Reason
from wan_grpc.domain.events import Stage, State
from wan_grpc.domain.observations import (
    Admitted,
    BytesSent,
    Ended,
    Exchanged,
    FramesDecoded,
    GroupReady,
    GroupRecovered,
    GroupRestarting,
    LoadChanged,
    Observation,
    RankChanged,
    RankFaulted,
    RankMemorySampled,
    Refused,
    RestartCause,
    StageEnded,
    Started,
    StepEnded,
)
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange
from wan_grpc.domain.variants import T2V_A14B, Expert, Limits, ModelCard, Task
from wan_grpc.telemetry.metrics import Metrics, MetricsServer

NAME = "generations/1"
CARD = ModelCard(
    model_id="m",
    task=Task.TEXT_TO_VIDEO,
    defaults=T2V_A14B,
    limits=Limits(max_area=1, max_num_frames=1, max_inference_steps=1),
    size_multiple=16,
)
READY = GroupReady(card=CARD, topology=Topology(ulysses=2), device="cpu", dtype="float32", attention="sdpa", load_s=2.5)
EVERYTHING: tuple[Observation, ...] = (
    Refused(reason=Reason.QUEUE_FULL),
    Admitted(name=NAME, request_id=None),
    Started(name=NAME, wait_s=2.0),
    StepEnded(name=NAME, expert=Expert.HIGH_NOISE, seconds=0.5),
    StepEnded(name=NAME, expert=Expert.LOW_NOISE, seconds=0.75, skew_s=0.125),
    StageEnded(name=NAME, stage=Stage.DENOISE, seconds=20.0),
    FramesDecoded(count=4),
    BytesSent(count=1000),
    Ended(name=NAME, state=State.SUCCEEDED, reason=None, duration_s=30.0),
    Ended(name=NAME, state=State.CANCELLED, reason=Reason.ABANDONED, duration_s=1.0),
    LoadChanged(num_queued=3, num_running=1, num_watchers=2),
    RankChanged(rank=0, up=True),
    RankChanged(rank=1, up=False),
    GroupRestarting(cause=RestartCause.RANK_DIED, detail="killed"),
    GroupRestarting(cause=RestartCause.RANK_HUNG, detail="silent"),
    GroupRecovered(cause=RestartCause.RANK_HUNG, seconds=30.0),
    GroupRecovered(cause=None, seconds=2.0),
    RankFaulted(rank=1, reason=Reason.OUT_OF_MEMORY),
    Exchanged(rank=1, kind=Exchange.ULYSSES, seconds=0.5, sent_bytes=1000),
    Exchanged(rank=1, kind=Exchange.ULYSSES, seconds=0.25, sent_bytes=500),
    Exchanged(rank=0, kind=Exchange.CFG, seconds=0.125, sent_bytes=30),
    RankMemorySampled(rank=1, used_bytes=10, peak_bytes=20),
    READY,
)


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample that is not zero, by its name and labels as Prometheus shows them; no buckets, no process."""
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.value and sample.name.startswith("wan_") and not sample.name.endswith("_bucket"):
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def observed(*observations: Observation) -> dict[str, float]:
    """What observing has changed."""
    metrics = Metrics()
    before = samples(metrics)
    for observation in observations:
        metrics.observe(observation)
    after = samples(metrics)
    return {name: value for name, value in after.items() if before.get(name) != value}


def test_every_observation_is_measured() -> None:
    """Each kind of observation changes exactly the metrics that are about it."""
    assert observed(*EVERYTHING) == {
        "wan_requests_total{outcome=refused,reason=QUEUE_FULL}": 1,
        "wan_requests_total{outcome=succeeded,reason=none}": 1,
        "wan_requests_total{outcome=cancelled,reason=ABANDONED}": 1,
        "wan_generation_duration_seconds_count{outcome=succeeded}": 1,
        "wan_generation_duration_seconds_sum{outcome=succeeded}": 30,
        "wan_generation_duration_seconds_count{outcome=cancelled}": 1,
        "wan_generation_duration_seconds_sum{outcome=cancelled}": 1,
        "wan_queue_wait_seconds_count{}": 1,
        "wan_queue_wait_seconds_sum{}": 2,
        "wan_stage_duration_seconds_count{stage=denoise}": 1,
        "wan_stage_duration_seconds_sum{stage=denoise}": 20,
        "wan_step_duration_seconds_count{expert=high_noise}": 1,
        "wan_step_duration_seconds_sum{expert=high_noise}": 0.5,
        "wan_step_duration_seconds_count{expert=low_noise}": 1,
        "wan_step_duration_seconds_sum{expert=low_noise}": 0.75,
        "wan_steps_total{expert=high_noise}": 1,
        "wan_steps_total{expert=low_noise}": 1,
        "wan_step_skew_seconds_count{}": 1,
        "wan_step_skew_seconds_sum{}": 0.125,
        "wan_frames_total{}": 4,
        "wan_sent_bytes_total{}": 1000,
        "wan_queue_depth{}": 3,
        "wan_running_generations{}": 1,
        "wan_watchers{}": 2,
        "wan_rank_up{rank=0}": 1,
        "wan_rank_restarts_total{cause=rank_died}": 1,
        "wan_rank_restarts_total{cause=rank_hung}": 1,
        "wan_rank_failures_total{reason=OUT_OF_MEMORY}": 1,
        "wan_recovery_seconds_count{cause=rank_hung}": 1,
        "wan_recovery_seconds_sum{cause=rank_hung}": 30,
        "wan_recovery_seconds_count{cause=rank_failed}": 1,
        "wan_recovery_seconds_sum{cause=rank_failed}": 2,
        "wan_exchange_seconds_total{kind=ulysses,rank=1}": 0.75,
        "wan_exchange_sent_bytes_total{kind=ulysses,rank=1}": 1500,
        "wan_exchange_seconds_total{kind=cfg,rank=0}": 0.125,
        "wan_exchange_sent_bytes_total{kind=cfg,rank=0}": 30,
        "wan_rank_memory_bytes{rank=1}": 10,
        "wan_rank_peak_memory_bytes{rank=1}": 20,
        "wan_model_load_seconds{}": 2.5,
        "wan_model_info{attention=sdpa,device=cpu,dtype=float32,model=m,task=t2v,world_size=2}": 1,
    }


def test_a_restart_leaves_one_model() -> None:
    """The model that is served now replaces the one before it: no stale series says otherwise."""
    other = GroupReady(
        card=CARD, topology=Topology(), device="cuda: NVIDIA H200", dtype="bfloat16", attention="sdpa", load_s=1.0
    )
    assert observed(READY, other) == {
        "wan_model_load_seconds{}": 1,
        "wan_model_info{attention=sdpa,device=cuda: NVIDIA H200,dtype=bfloat16,model=m,task=t2v,world_size=1}": 1,
    }


def test_a_long_job_has_its_bucket() -> None:
    """Times up to an hour are told apart."""
    metrics = Metrics()
    metrics.observe(Ended(name=NAME, state=State.SUCCEEDED, reason=None, duration_s=3500.0))
    counts = {
        bound: metrics.registry.get_sample_value(
            "wan_generation_duration_seconds_bucket", {"outcome": "succeeded", "le": bound}
        )
        for bound in ("2700.0", "3600.0")
    }
    assert counts == {"2700.0": 0, "3600.0": 1}


def scrape() -> str:
    metrics = Metrics()
    for observation in EVERYTHING:
        metrics.observe(observation)
    with (
        MetricsServer(metrics, host="127.0.0.1", port=0) as server,
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer,
    ):
        return str(answer.read().decode())


def test_promtool_has_nothing_to_say() -> None:
    """A real scrape with every metric in it passes `promtool check metrics` without a word."""
    promtool = shutil.which("promtool")
    assert promtool, "promtool is not on PATH; `make promtool` brings it"
    done = subprocess.run([promtool, "check", "metrics"], input=scrape(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_scrape_stops_with_the_block() -> None:
    """After the `with` block the port is free again."""
    with MetricsServer(Metrics(), host="127.0.0.1", port=0) as server:
        port = server.port
    with MetricsServer(Metrics(), host="127.0.0.1", port=port) as server:
        assert server.port == port


def test_a_taken_port_is_refused() -> None:
    """Two servers do not share a metrics port by accident."""
    with MetricsServer(Metrics(), host="127.0.0.1", port=0) as server, pytest.raises(OSError, match="in use"):
        MetricsServer(Metrics(), host="127.0.0.1", port=server.port).__enter__()
