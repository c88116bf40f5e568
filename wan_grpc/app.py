"""The composition root: settings in, a running service out, in the order in which things must start and stop.

Knows every floor by its constructor. Does none of their work, and imports no torch: the ranks do.
"""

import asyncio
import os
import re
import signal
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import structlog

from wan_grpc.config import OFF, GenerateSettings, RankSettings, ServeSettings
from wan_grpc.domain.errors import ServiceError
from wan_grpc.domain.events import Chunk, Completed, Event, Failed
from wan_grpc.domain.formats import FORMATS
from wan_grpc.domain.observations import Observation
from wan_grpc.domain.request import GenerationRequest, VideoRequest
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Limits, ModelCard
from wan_grpc.engine.engine import Engine, EngineOptions
from wan_grpc.engine.executor import Executor, RestartPolicy
from wan_grpc.engine.group import GroupPlan, prepare_forkserver
from wan_grpc.pipeline.checkpoint import Checkpoint, locate, read_card
from wan_grpc.pipeline.prompt import token_counter
from wan_grpc.pipeline.tiny import ensure_tiny_model
from wan_grpc.rpc.server import RpcServer, ServerOptions, build_server
from wan_grpc.store.artifacts import Spool
from wan_grpc.telemetry import logs
from wan_grpc.telemetry.metrics import Metrics, MetricsServer

EMBEDDED: Final = "embedded"
_NAME_LENGTH: Final = 60
Observe = Callable[[Observation], None]

log = structlog.stdlib.get_logger("wan_grpc")


async def serve(settings: ServeSettings, on_listening: Callable[[str, int], None]) -> int:
    """Serve until told to stop; the exit code. `on_listening` is told the address once calls are taken.

    Raises:
        UnusableModelError: the model cannot be had.
        OSError: an address or a directory cannot be had.
    """
    logs.configure(level=settings.log_level, log_format=settings.log_format)
    metrics = Metrics()

    def observe(observation: Observation) -> None:
        metrics.observe(observation)
        logs.observe(observation)

    with _metrics_server(settings, metrics) as scraped:
        async with composed_engine(settings, _engine_options(settings), observe) as engine:
            server = build_server(engine, _server_options(settings))
            await server.start()  # before the ranks: an address that cannot be had is told at once
            await engine.start()
            log.info("listening", port=server.port, metrics_port=scraped.port if scraped else None)
            on_listening(settings.host, server.port)
            return await _until_told_to_stop(engine, server)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A video that was generated without a server."""

    video: VideoRequest
    completed: Completed
    path: Path | None
    """Where it was written; None where it was not to be."""


async def generate(settings: GenerateSettings, on_event: Callable[[Event], None]) -> Made:
    """Generate one video with an engine of its own. Whoever leaves early cancels it.

    Raises:
        InvalidRequestError: naming every field that breaks a rule.
        ServiceError: the generation ended without a video, and why.
        UnusableModelError: the model cannot be had.
        OSError: a directory or the file cannot be written.
    """
    logs.configure(level=settings.log_level, log_format=settings.log_format)
    async with composed_engine(settings, EngineOptions(max_queue=1), logs.observe) as engine:
        generation = await engine.submit(_request(settings), watched=True)
        await engine.start()  # only now: a request that breaks rules is told at once
        with _output_file(settings, generation.video) as output:
            async with aclosing(engine.watch(generation.name)) as records:
                async for record in records:
                    _keep(record.event, output)
                    on_event(record.event)
    assert isinstance(record.event, Completed)
    return Made(video=generation.video, completed=record.event, path=output.path if output else None)


@asynccontextmanager
async def composed_engine(
    settings: RankSettings, options: EngineOptions, observe: Observe
) -> AsyncGenerator[Engine, None]:
    """An engine that is ready to be started, and which is gone with all it held when the block ends."""
    checkpoint, card = find_model(settings)
    prepare_forkserver()  # only now: a model that cannot be had is told at once
    with closing(Spool(settings.spool_dir)) as spool:
        executor = Executor(
            plan_ranks(settings, checkpoint, spool.directory), card, policy=_restart_policy(settings), observe=observe
        )
        engine = Engine(card, executor, spool, options=options, observe=observe, count_tokens=token_counter(checkpoint))
        try:
            yield engine
        finally:
            await engine.stop()


def find_model(settings: RankSettings) -> tuple[Checkpoint, ModelCard]:
    """The checkpoint and what it can do. Blocks for as long as a hub needs to send it.

    Raises:
        UnusableModelError: it cannot be had or cannot be served.
    """
    path = settings.model_path
    if path is None:
        log.warning("NO --model-path: serving the tiny embedded model. It knows nothing, its videos are noise.")
        path = str(ensure_tiny_model(settings.cache_dir.expanduser()))
    checkpoint = locate(path, load_format=settings.load_format)
    limits = Limits(
        max_area=settings.max_area,
        max_num_frames=settings.max_num_frames,
        max_inference_steps=settings.max_inference_steps,
    )
    return checkpoint, read_card(checkpoint, model_id=settings.model_path or EMBEDDED, limits=limits)


def plan_ranks(settings: RankSettings, checkpoint: Checkpoint, directory: Path) -> GroupPlan:
    num_cores = len(os.sched_getaffinity(0))
    return GroupPlan(
        topology=Topology(copies=settings.num_gpus),
        checkpoint=checkpoint,
        device=settings.device,
        dtype=settings.dtype,
        load_format=settings.load_format,
        cpu_threads=settings.cpu_threads or max(1, num_cores // settings.num_gpus),
        max_frame_bytes=settings.max_area * 3,
        directory=directory,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )


def _restart_policy(settings: RankSettings) -> RestartPolicy:
    return RestartPolicy(
        max_failures=settings.max_failed_starts,
        window_s=settings.failed_start_window_s,
        start_timeout_s=settings.start_timeout_s,
    )


# ---- serve ----------------------------------------------------------------------------------------------------------


def _metrics_server(settings: ServeSettings, metrics: Metrics) -> AbstractContextManager[MetricsServer | None]:
    if settings.metrics_port == OFF:
        return nullcontext()
    return MetricsServer(metrics, host=settings.metrics_host or settings.host, port=settings.metrics_port)


def _engine_options(settings: ServeSettings) -> EngineOptions:
    return EngineOptions(
        max_queue=settings.max_queue,
        detach_grace_s=settings.detach_grace_s,
        heartbeat_s=settings.heartbeat_s,
        max_encoding=settings.max_encoding,
        retain_s=settings.retain_s,
        retain_count=settings.retain_count,
    )


def _server_options(settings: ServeSettings) -> ServerOptions:
    return ServerOptions(
        host=settings.host,
        port=settings.port,
        keepalive_time_s=settings.keepalive_time_s,
        keepalive_timeout_s=settings.keepalive_timeout_s,
        min_ping_interval_s=settings.min_ping_interval_s,
        max_connection_age_s=settings.max_connection_age_s,
        max_connection_age_grace_s=settings.max_connection_age_grace_s,
        max_concurrent_calls=settings.max_concurrent_calls,
        drain_window_s=settings.drain_window_s,
        drain_timeout_s=settings.drain_timeout_s,
    )


async def _until_told_to_stop(engine: Engine, server: RpcServer) -> int:
    """Wait for a signal or for the end of all hope, then leave in order; the exit code."""
    with _signals() as signals:
        told = asyncio.ensure_future(signals.get())
        await asyncio.wait({told, engine.fatal}, return_when=asyncio.FIRST_COMPLETED)
        if engine.fatal.done():
            told.cancel()
            log.critical("the ranks cannot work, and starting them again is no use", detail=engine.fatal.result())
            signals.put_nowait("none")  # there is nothing to wait for
        else:
            log.info("stopping: the next signal cancels what still runs", signal=told.result())
        await _stop_server(engine, server, signals)
    return 1 if engine.fatal.done() else 0


async def _stop_server(engine: Engine, server: RpcServer, signals: "asyncio.Queue[str]") -> None:
    stopping = asyncio.ensure_future(server.stop())
    again = asyncio.ensure_future(signals.get())
    await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        log.warning("cancelling what still runs", signal=again.result())
        server.hurry()
        await engine.drain(0.0)  # which is also the end of a drain that is under way
    again.cancel()
    await stopping


@contextmanager
def _signals() -> Iterator["asyncio.Queue[str]"]:
    """SIGTERM and SIGINT as names in a queue instead of an end or an exception."""
    names: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    wanted = (signal.SIGTERM, signal.SIGINT)
    for number in wanted:
        loop.add_signal_handler(number, names.put_nowait, number.name)
    try:
        yield names
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)


# ---- generate -------------------------------------------------------------------------------------------------------


def _request(settings: GenerateSettings) -> GenerationRequest:
    return GenerationRequest(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        width=settings.width,
        height=settings.height,
        num_frames=settings.num_frames,
        fps=settings.fps,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_2,
        flow_shift=settings.flow_shift,
        boundary_ratio=settings.boundary_ratio,
        seed=settings.seed,
        output_format=settings.output_format,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    path: Path
    """Where the video is once it is complete."""
    file: IO[bytes]


def _keep(event: Event, output: OutputFile | None) -> None:
    if isinstance(event, Failed):
        raise ServiceError(event.failure.reason, event.failure.message, retry_after_s=event.failure.retry_after_s)
    if isinstance(event, Chunk) and output is not None:
        output.file.write(event.data)


@contextmanager
def _output_file(settings: GenerateSettings, video: VideoRequest) -> Iterator[OutputFile | None]:
    """The file for the video, which is there under its name only if the block ends well."""
    if not settings.save_output:
        yield None
        return
    path = settings.output_path.expanduser() / (settings.output_file_name or _file_name(video))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as file:
            yield OutputFile(path=path, file=file)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _file_name(video: VideoRequest) -> str:
    """Words of the prompt and the seed, so that the name tells what is inside and can be made again."""
    words = re.sub(r"[^\w]+", "-", video.prompt).strip("-")[:_NAME_LENGTH].strip("-")
    return f"{words or 'video'}-{video.seed}{FORMATS[video.output_format].suffix}"
