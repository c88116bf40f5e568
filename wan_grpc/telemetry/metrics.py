"""Observations as Prometheus metrics, on a registry and a port of their own.

Knows names, labels and buckets. Base units only: seconds and bytes. Does not know who observes.
"""

import platform
from collections.abc import Sequence
from importlib import metadata
from threading import Thread
from types import TracebackType
from typing import Final, Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from wan_grpc import __version__
from wan_grpc.domain.errors import Reason
from wan_grpc.domain.events import Stage
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
from wan_grpc.domain.variants import Expert

STEP_BUCKETS_S: Final = (0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300)
JOB_BUCKETS_S: Final = (0.1, 0.3, 1, 3, 5, 10, 20, 30, 60, 120, 180, 300, 450, 600, 900, 1200, 1800, 2700, 3600)
SKEW_BUCKETS_S: Final = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60)
NO_REASON: Final = "none"
NO_RESTART: Final = "rank_failed"
"""The cause of a recovery for which no rank had to be started again."""


class Metrics:
    """Every metric of one server process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nobody reads
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "wan_requests", "Requests by how they ended and why; refused ones never began.", ["outcome", "reason"]
        )
        self._durations = self._histogram(
            "wan_generation_duration_seconds", "From admission to the end of a generation.", JOB_BUCKETS_S, ["outcome"]
        )
        self._waits = self._histogram("wan_queue_wait_seconds", "From admission to the first rank.", JOB_BUCKETS_S)
        self._stages = self._histogram(
            "wan_stage_duration_seconds", "Time of each stage of a generation.", JOB_BUCKETS_S, ["stage"]
        )
        self._steps = self._histogram(
            "wan_step_duration_seconds", "Device time of one denoising step.", STEP_BUCKETS_S, ["expert"]
        )
        self._skews = self._histogram(
            "wan_step_skew_seconds",
            "By how much the busiest rank worked longer for a denoising step than the least busy one.",
            SKEW_BUCKETS_S,
        )
        self._steps_total = self._counter("wan_steps", "Denoising steps that a device finished.", ["expert"])
        self._frames = self._counter("wan_frames", "Frames decoded.")
        self._sent = self._counter("wan_sent_bytes", "Video bytes handed to watchers and downloads.")
        self._restarts = self._counter("wan_rank_restarts", "Times the ranks had to be started again.", ["cause"])
        self._faults = self._counter("wan_rank_failures", "Ranks that raised in a generation and lived on.", ["reason"])
        self._recoveries = self._histogram(
            "wan_recovery_seconds",
            "From a rank found dead or hung, or failed, until the ranks could work again.",
            JOB_BUCKETS_S,
            ["cause"],
        )
        self._exchange_s = self._counter(
            "wan_exchange_seconds", "Time that the rank's device waited for exchanges of data.", ["kind", "rank"]
        )
        self._exchange_bytes = self._counter(
            "wan_exchange_sent_bytes", "Data that the rank sent to other ranks.", ["kind", "rank"]
        )
        self._queued = self._gauge("wan_queue_depth", "Generations that wait for the ranks.")
        self._running = self._gauge("wan_running_generations", "Generations that the ranks compute now.")
        self._watchers = self._gauge("wan_watchers", "Streams that follow a generation now.")
        self._rank_up = self._gauge("wan_rank_up", "1 while the rank can work, else 0.", ["rank"])
        self._rank_used = self._gauge(
            "wan_rank_memory_bytes", "Memory that the rank holds on its device (resident set size on CPU).", ["rank"]
        )
        self._rank_peak = self._gauge(
            "wan_rank_peak_memory_bytes", "Most memory that the rank held during the last generation.", ["rank"]
        )
        self._load_time = self._gauge("wan_model_load_seconds", "How long the ranks took to load the model.")
        self._model = self._gauge(
            "wan_model_info",
            "What is served, in labels.",
            ["model", "task", "device", "dtype", "attention", "world_size"],
        )
        self._show_what_may_come()
        self._show_build()
        ProcessCollector(registry=self.registry)

    def observe(self, observation: Observation) -> None:
        match observation:
            case Refused(reason=reason):
                self._requests.labels("refused", reason).inc()
            case Admitted():
                pass  # counted when it ends
            case Started(wait_s=wait_s):
                self._waits.observe(wait_s)
            case StepEnded():
                self._observe_step(observation)
            case StageEnded(stage=stage, seconds=seconds):
                self._stages.labels(stage).observe(seconds)
            case FramesDecoded(count=count):
                self._frames.inc(count)
            case BytesSent(count=count):
                self._sent.inc(count)
            case Ended(state=state, reason=why, duration_s=duration_s):
                self._requests.labels(state, why or NO_REASON).inc()
                self._durations.labels(state).observe(duration_s)
            case LoadChanged() as load:
                self._queued.set(load.num_queued)
                self._running.set(load.num_running)
                self._watchers.set(load.num_watchers)
            case RankChanged() | RankMemorySampled() | Exchanged() | GroupReady():
                self._observe_ranks(observation)
            case GroupRestarting() | GroupRecovered() | RankFaulted():
                self._observe_trouble(observation)

    def _observe_step(self, step: StepEnded) -> None:
        self._steps.labels(step.expert).observe(step.seconds)
        self._steps_total.labels(step.expert).inc()
        if step.skew_s is not None:
            self._skews.observe(step.skew_s)

    def _observe_trouble(self, observation: GroupRestarting | GroupRecovered | RankFaulted) -> None:
        match observation:
            case GroupRestarting(cause=cause):
                self._restarts.labels(cause).inc()
            case GroupRecovered(cause=recovered_from, seconds=seconds):
                self._recoveries.labels(recovered_from or NO_RESTART).observe(seconds)
            case RankFaulted(reason=reason):
                self._faults.labels(reason).inc()

    def _observe_ranks(self, observation: RankChanged | RankMemorySampled | Exchanged | GroupReady) -> None:
        match observation:
            case RankChanged(rank=rank, up=up):
                self._rank_up.labels(rank).set(up)
            case Exchanged(rank=rank, kind=kind) as exchanged:
                self._exchange_s.labels(kind, rank).inc(exchanged.seconds)
                self._exchange_bytes.labels(kind, rank).inc(exchanged.sent_bytes)
            case RankMemorySampled(rank=rank, used_bytes=used, peak_bytes=peak):
                self._rank_used.labels(rank).set(used)
                self._rank_peak.labels(rank).set(peak)
            case GroupReady(card=card, topology=topology, load_s=load_s) as ready:
                self._load_time.set(load_s)
                self._model.clear()
                size = topology.world_size
                self._model.labels(card.model_id, card.task, ready.device, ready.dtype, ready.attention, size).set(1)

    def _show_what_may_come(self) -> None:
        """Start every series whose labels are known at zero, so that its first event is an increase."""
        for expert in Expert:
            self._steps.labels(expert)
            self._steps_total.labels(expert)
        for stage in Stage:
            self._stages.labels(stage)
        for cause in RestartCause:
            self._restarts.labels(cause)
        for recovered_from in (*RestartCause, NO_RESTART):
            self._recoveries.labels(recovered_from)
        for reason in (Reason.INTERNAL, Reason.OUT_OF_MEMORY):
            self._faults.labels(reason)

    def _show_build(self) -> None:
        build = self._gauge("wan_build_info", "Versions, in labels.", ["version", "python", "torch", "grpcio"])
        build.labels(__version__, platform.python_version(), metadata.version("torch"), metadata.version("grpcio")).set(
            1
        )

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class MetricsServer:
    """Answers scrapes over HTTP from a thread of its own, for as long as the `with` block lasts.

    Raises:
        OSError: on entry, when the address cannot be listened on.
    """

    def __init__(self, metrics: Metrics, *, host: str, port: int) -> None:
        self._metrics = metrics
        self._host = host
        self._port = port

    def __enter__(self) -> Self:
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(self._port, self._host, registry=self._metrics.registry)
        except OSError as error:
            raise OSError(f"metrics cannot be served on {self._host} port {self._port}: {error.strerror}") from error
        return self

    @property
    def port(self) -> int:
        return self._server.server_port

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
