"""The composition root: settings in, a running service out, in the order in which things must start and stop.

Knows every floor by its constructor. Does none of their work, and imports no torch: the ranks do.
"""

import asyncio
import codecs
import functools
import math
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, closing, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Final

import structlog

from wan_grpc.config import OFF, GenerateSettings, RankSettings, ServeSettings, UsageError, split_address
from wan_grpc.domain.errors import InvalidRequestError, ServiceError, UnusableModelError, Violation
from wan_grpc.domain.events import Chunk, Completed, Event, Failed, Generation
from wan_grpc.domain.observations import Observation
from wan_grpc.domain.offer import offered
from wan_grpc.domain.request import GenerationRequest, VideoRequest
from wan_grpc.domain.topology import Divisible, Topology, TopologyError, Wanted, choose_topology, group_size, in_words
from wan_grpc.domain.variants import Limits, ModelCard
from wan_grpc.engine.engine import Engine, EngineOptions
from wan_grpc.engine.executor import Executor, RestartPolicy
from wan_grpc.engine.group import GroupPlan, RankGroup, prepare_forkserver
from wan_grpc.engine.intake import Intake
from wan_grpc.engine.joining import Hosts
from wan_grpc.engine.links import Endpoint, read_secret
from wan_grpc.engine.watchdog import Patience
from wan_grpc.pipeline import embedded
from wan_grpc.pipeline.checkpoint import DUMMY, Checkpoint, locate, read_card
from wan_grpc.pipeline.prompt import token_counter
from wan_grpc.rpc.server import RpcServer, ServerOptions, build_server
from wan_grpc.store.artifacts import Spool
from wan_grpc.telemetry import logs
from wan_grpc.telemetry.metrics import Metrics, MetricsServer

_NUM_AHEAD: Final = 1
"""Generations that are handed to the engine beside those that its replicas compute: the last one may yet be encoded."""
_TOPOLOGY_FLAGS: Final = {
    "groups": "--replicas",
    "cfg": "--enable-cfg-parallel",
    "sequence": "--sp-degree",
    "ring": "--ring-degree",
    "ulysses": "--ulysses-degree",
    "text_tensor": "--tp-size",
}
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
class Job:
    """One video to generate without a server."""

    request: GenerationRequest
    """But for its images, which are read when their turn comes."""
    image: Path | None = None
    last_image: Path | None = None
    path: Path | None = None
    """Where the video is to be written; None: nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A video that was generated without a server."""

    video: VideoRequest
    completed: Completed


class RefusedJobsError(Exception):
    """Jobs that break rules, none of which was begun: the number of each with one thing wrong with it."""

    def __init__(self, violations: Sequence[tuple[int, Violation]]) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for _, violation in violations))
        self.violations = tuple(violations)


async def generate(
    settings: GenerateSettings, jobs: Sequence[Job], on_event: Callable[[int, Event], None]
) -> AsyncGenerator[Made | ServiceError | OSError, None]:
    """Generate `jobs` with an engine of their own: in their order, what became of each. Whoever leaves early cancels.

    on_event: is told the number of the job and what happens to it.

    Raises:
        RefusedJobsError: before any of them is begun.
        UnusableModelError: the model cannot be had.
        UsageError: a file that the settings name cannot be used.
        OSError: a directory cannot be written.
    """
    logs.configure(level=settings.log_level, log_format=settings.log_format)
    num_ahead = settings.replicas + _NUM_AHEAD
    options = EngineOptions(max_queue=num_ahead, detach_grace_s=math.inf)
    async with composed_engine(settings, options, logs.observe) as engine:
        _refuse_what_breaks_rules(engine.card, jobs)
        await engine.start()  # only now: what breaks rules is told at once
        begun: list[Generation | ServiceError | OSError] = []
        for number, job in enumerate(jobs):
            while len(begun) < min(number + num_ahead, len(jobs)):
                begun.append(await _begin(engine, jobs[len(begun)]))
            generation = begun[number]
            if isinstance(generation, Generation):
                yield await _finish(engine, generation, job, functools.partial(on_event, number))
            else:
                yield generation


@asynccontextmanager
async def composed_engine(
    settings: RankSettings, options: EngineOptions, observe: Observe
) -> AsyncGenerator[Engine, None]:
    """An engine that is ready to be started, and which is gone with all it held when the block ends."""
    refuse_wrong_hosts(settings)
    checkpoint, card = find_model(settings)
    topology = find_topology(settings, checkpoint, card)
    prepare_forkserver()  # only now: a model that cannot be had is told at once
    with closing(Spool(settings.spool_dir)) as spool, _other_hosts(settings) as hosts:
        executors = [
            Executor(
                plan,
                card,
                policy=_restart_policy(settings),
                observe=observe,
                make_group=functools.partial(RankGroup, hosts=hosts),
            )
            for plan in plan_groups(settings, topology, checkpoint, spool.directory)
        ]
        count_tokens = token_counter(checkpoint)
        engine = Engine(card, executors, spool, options=options, observe=observe, count_tokens=count_tokens)
        try:
            yield engine
        finally:
            if hosts is not None and engine.fatal.done():
                hosts.give_up()
            await engine.stop()


def find_model(settings: RankSettings) -> tuple[Checkpoint, ModelCard]:
    """The checkpoint and what it can do. Blocks for as long as a hub needs to send it.

    Raises:
        UnusableModelError: it cannot be had or cannot be served.
    """
    name = embedded.DEFAULT if settings.model_path is None else settings.model_path
    if settings.model_path is None:
        log.warning("NO --model-path: serving the small embedded model, which knows coloured shapes in motion alone")
    found = locate(embedded.resolved(name, settings.cache_dir.expanduser()), load_format=settings.load_format)
    checkpoint = replace(found, model_path=name)
    limits = Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)})
    card = replace(read_card(checkpoint, model_id=name, limits=limits), embedded=embedded.is_embedded(name))
    if settings.load_format == DUMMY:  # random weights know no words, and nobody takes them for a model that does
        card = replace(card, embedded=False, words=frozenset())
    return checkpoint, _offer(card, settings)


def _offer(card: ModelCard, settings: RankSettings) -> ModelCard:
    path = settings.default_negative_prompt_file
    text = card.defaults.negative_prompt if path is None else _read_prompt(path, card.limits.max_prompt_bytes)
    try:
        offer = offered(card, negative_prompt=text)
    except InvalidRequestError as error:
        told = {one.field.removeprefix("spec."): one.description for one in error.violations}
        if path is not None and "negative_prompt" in told:
            raise UsageError([f"--default-negative-prompt-file: {path}: {told['negative_prompt']}"]) from error
        sentences = "; ".join(f"{name}: {sentence}" for name, sentence in told.items())
        raise UnusableModelError(f"what requests mean by default cannot be served: {sentences}") from error
    if lowered := _lowered(card, offer):
        log.warning("the limits are below the model's own defaults, which become", **lowered)
    return offer


def _read_prompt(path: Path, max_bytes: int) -> str:
    flag, most = "--default-negative-prompt-file", max_bytes + len(codecs.BOM_UTF8) + len("\r\n")
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise UsageError([f"{flag}: {path}: is longer than {max_bytes} bytes"])
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UsageError([f"{flag}: {path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise UsageError([f"{flag}: {path}: is not UTF-8 text"]) from error


def _lowered(card: ModelCard, offer: ModelCard) -> dict[str, int]:
    names = ("width", "height", "num_frames", "num_inference_steps")
    values = {name: getattr(offer.defaults, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(card.defaults, name)}


def find_topology(settings: RankSettings, checkpoint: Checkpoint, card: ModelCard) -> Topology:
    """How each replica divides a generation: as the settings say, and what they leave open as is best.

    Raises:
        UsageError: the settings contradict each other, or the model.
    """
    experts = ("transformer", "transformer_2") if checkpoint.has_two_experts else ("transformer",)
    model = Divisible(
        num_heads=math.gcd(*(checkpoint.value(expert, "num_attention_heads") for expert in experts)),
        num_text_heads=checkpoint.value("text_encoder", "num_heads"),
        num_text_units=checkpoint.value("text_encoder", "d_ff"),
    )
    wanted = Wanted(
        cfg=settings.enable_cfg_parallel,
        sequence=settings.sp_degree,
        ring=settings.ring_degree,
        ulysses=settings.ulysses_degree,
        text_tensor=settings.tp_size,
    )
    try:
        num_ranks = group_size(settings.num_gpus, settings.replicas)
        guided = card.defaults.guidance_scale > 1.0
        return choose_topology(num_ranks, model=model, guided=guided, wanted=wanted)
    except TopologyError as error:
        replicas = f", --replicas {settings.replicas}" if settings.replicas > 1 else ""
        given = f"--num-gpus {settings.num_gpus}{replicas}"
        told = [f"{_TOPOLOGY_FLAGS[field]}: {sentence} ({given})" for field, sentence in error.problems]
        raise UsageError(told) from error


def plan_groups(
    settings: RankSettings, topology: Topology, checkpoint: Checkpoint, directory: Path
) -> Iterator[GroupPlan]:
    """One a replica. The devices of this host are theirs in turn."""
    num_cores = len(os.sched_getaffinity(0))
    plan = GroupPlan(
        topology=topology,
        checkpoint=checkpoint,
        device=settings.device,
        dtype=settings.dtype,
        load_format=settings.load_format,
        cpu_threads=settings.cpu_threads or max(1, num_cores * settings.nnodes // settings.num_gpus),
        max_frame_bytes=settings.max_area * 3,
        directory=directory,
        demand=_demand(settings, topology),
        log_format=settings.log_format,
        log_level=settings.log_level,
    )
    for replica in range(settings.replicas):
        yield replace(plan, first_rank=replica * topology.world_size)


def _demand(settings: RankSettings, topology: Topology) -> str:
    num_gpus = settings.num_gpus // settings.nnodes
    needs = f"--num-gpus {settings.num_gpus} needs {num_gpus} GPU{'s' if num_gpus > 1 else ''}"
    where = f" on each of --nnodes {settings.nnodes}" if settings.nnodes > 1 else ""
    replicas = f"{settings.replicas} replicas of " if settings.replicas > 1 else ""
    layout = f" ({replicas}{in_words(topology)})" if settings.num_gpus > 1 else ""
    return f"{needs}{where}{layout}"


def refuse_wrong_hosts(settings: RankSettings) -> None:
    """Raise UsageError for whatever is wrong with how the ranks are spread over hosts."""
    problems = []
    needs = {"--join-address": settings.join_address, "--join-secret-file": settings.join_secret_file}
    for flag, value in needs.items():
        if settings.nnodes > 1 and value is None:
            problems.append(f"{flag}: must be given when --nnodes is more than 1")
        if settings.nnodes == 1 and value is not None:
            problems.append(f"{flag}: only with --nnodes above 1")
    if settings.join_secret_file is not None:
        try:
            read_secret(settings.join_secret_file)
        except ValueError as error:
            problems.append(f"--join-secret-file: {error}")
        except OSError as error:
            problems.append(f"--join-secret-file: {settings.join_secret_file}: cannot be read: {error.strerror}")
    if settings.nnodes > 1 and settings.replicas > 1:
        problems.append(f"--replicas: {settings.replicas}, but the ranks of --nnodes {settings.nnodes} are one group")
    if settings.num_gpus % settings.nnodes:
        problems.append(f"--num-gpus: {settings.num_gpus} ranks are not as many on each of --nnodes {settings.nnodes}")
    if problems:
        raise UsageError(problems)


@contextmanager
def _other_hosts(settings: RankSettings) -> Iterator[Hosts | None]:
    """Where ranks of other hosts join, if any are to. It starts threads: not before the forkserver is there."""
    if settings.join_address is None or settings.join_secret_file is None:
        yield None
        return
    host, port = split_address(settings.join_address)
    try:
        hosts = Hosts(
            at=Endpoint(host=host, port=port),
            secret=read_secret(settings.join_secret_file),
            num_nodes=settings.nnodes,
            ranks_per_node=settings.num_gpus // settings.nnodes,
        )
    except ValueError as error:
        raise UsageError([f"--join-address: {error}, not {settings.join_address!r}"]) from error
    except OSError as error:
        raise UsageError([f"--join-address: {settings.join_address}: {error.strerror or error}"]) from error
    with closing(hosts):
        try:
            yield hosts
        except Exception:
            hosts.give_up()
            raise


def _restart_policy(settings: RankSettings) -> RestartPolicy:
    return RestartPolicy(
        max_failures=settings.max_failed_starts,
        window_s=settings.failed_start_window_s,
        start_timeout_s=settings.start_timeout_s,
        patience=Patience(grace_s=settings.watchdog_grace_s, first_step_timeout_s=settings.first_step_timeout_s),
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


def _refuse_what_breaks_rules(card: ModelCard, jobs: Sequence[Job]) -> None:
    intake = Intake(card, count_tokens=len)  # tokens are only warned of, and that by the engine's own intake
    wrong: list[tuple[int, Violation]] = []
    for number, job in enumerate(jobs):
        unreadable = dict(_unreadable_images(job))
        told = {violation.field for violation in unreadable.values()}  # or else such an image would be missing, too
        readable = replace(
            job,
            image=None if "image" in unreadable else job.image,
            last_image=None if "last_image" in unreadable else job.last_image,
        )
        try:
            intake.prepare(_with_images(readable, card))
            found: tuple[Violation, ...] = ()
        except InvalidRequestError as error:
            found = tuple(violation for violation in error.violations if violation.field not in told)
        wrong += [(number, violation) for violation in (*found, *unreadable.values())]
    if wrong:
        raise RefusedJobsError(wrong)


def _unreadable_images(job: Job) -> Iterator[tuple[str, Violation]]:
    for name, path in (("image", job.image), ("last_image", job.last_image)):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            yield name, Violation(field=f"spec.{name}", description=f"{path}: {error.strerror}", reason="UNREADABLE")


def _with_images(job: Job, card: ModelCard) -> GenerationRequest:
    most = card.limits.max_image_bytes + 1  # which is refused
    return replace(job.request, image=_read(job.image, most), last_image=_read(job.last_image, most))


def _read(path: Path | None, most: int) -> bytes | None:
    if path is None:
        return None
    with path.open("rb") as file:
        return file.read(most)


async def _begin(engine: Engine, job: Job) -> Generation | ServiceError | OSError:
    try:
        return await engine.submit(_with_images(job, engine.card), watched=True)
    except (ServiceError, OSError) as error:
        return error


async def _finish(
    engine: Engine, generation: Generation, job: Job, on_event: Callable[[Event], None]
) -> Made | ServiceError | OSError:
    """Watch a generation to its end, and forget it, so that no video is kept twice."""
    outcome: Made | ServiceError | OSError
    try:
        with _output_file(job.path) as file:
            async with aclosing(engine.watch(generation.name)) as records:
                async for record in records:
                    _keep(record.event, file)
                    on_event(record.event)
        assert isinstance(record.event, Completed)
        outcome = Made(video=generation.video, completed=record.event)
    except (ServiceError, OSError) as error:
        await engine.cancel(generation.name)  # which goes on where it was the file that failed
        outcome = error
    await engine.delete(generation.name)
    return outcome


def _keep(event: Event, file: IO[bytes] | None) -> None:
    if isinstance(event, Failed):
        raise ServiceError(event.failure.reason, event.failure.message, retry_after_s=event.failure.retry_after_s)
    if isinstance(event, Chunk) and file is not None:
        file.write(event.data)


@contextmanager
def _output_file(path: Path | None) -> Iterator[IO[bytes] | None]:
    """The file for a video, which is there under its name only if the block ends well."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with scratch.open("wb") as file:
            yield file
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
