"""What the service itself costs, on one machine, over loopback.

    python benchmarks/service_overhead.py --out results.json

Two parts. With stand-in ranks that compute nothing and deliver as fast as they are asked: events a second through one
stream, MB/s of chunks to one and to eight readers. With real ranks and the tiny model: the time from the request to
the last byte through gRPC against the same engine called directly, in turn, as a ratio.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from wan_grpc.app import composed_engine
from wan_grpc.config import ServeSettings
from wan_grpc.domain.events import Completed, Progress, Stage
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.observations import Observation
from wan_grpc.domain.request import GenerationRequest, VideoRequest
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import T2V_A14B, Expert, Limits, ModelCard, Task
from wan_grpc.engine.bell import Bell
from wan_grpc.engine.engine import Engine, EngineOptions
from wan_grpc.engine.group import GroupPlan, TakeFrame
from wan_grpc.engine.messages import MemoryUse, Ready, RunEnded, StepDone
from wan_grpc.pipeline.checkpoint import Checkpoint
from wan_grpc.pipeline.tiny import make_tiny_model
from wan_grpc.rpc.server import ServerOptions, build_server
from wan_grpc.store.artifacts import Spool
from wan_grpc.v1 import generation_pb2 as pb
from wan_grpc.v1.video_generation_service_pb2 import GenerateRequest, WatchGenerationRequest
from wan_grpc.v1.video_generation_service_pb2_grpc import VideoGenerationServiceStub

NUM_STEPS = 20_000
CARD = ModelCard(
    model_id="stand-in",
    task=Task.TEXT_TO_VIDEO,
    defaults=T2V_A14B,
    limits=Limits(max_area=1280 * 720, max_num_frames=201, max_inference_steps=NUM_STEPS),
    size_multiple=16,
)


class StandInRanks:
    """What the engine asks of an executor, with steps and frames that cost nothing."""

    def __init__(self, directory: Path) -> None:
        self.plan = GroupPlan(
            topology=Topology(),
            checkpoint=Checkpoint(model_path="stand-in", directory=None),
            device="cpu",
            dtype="float32",
            load_format="dummy",
            cpu_threads=1,
            max_frame_bytes=1,
            directory=directory,
        )
        self.changed = Bell()
        self.ready = (Ready(links_s=0.0, rank=0, device="none", dtype="none", attention="none", used_bytes=0),)
        self.memory: tuple[MemoryUse, ...] = ()
        self.detail = "ready"
        self.is_ready = True
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        pass

    async def wait_ready(self) -> None:
        pass

    def cancel(self, generation: str) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def run(
        self, generation: str, video: VideoRequest, frames: InputFrames, take_frame: TakeFrame
    ) -> AsyncGenerator[StepDone | RunEnded, None]:
        total = video.num_inference_steps
        for step in range(total + 1):
            expert = Expert.HIGH_NOISE if step else None
            yield _step(Stage.DENOISE, step, total, expert)
            await asyncio.sleep(0)  # a message from a rank is a turn of the loop
        frame = memoryview(bytes(range(256)) * (video.frame_bytes // 256 + 1))[: video.frame_bytes]
        for index in range(video.num_frames):
            yield _step(Stage.DECODE, index, video.num_frames, None)
            await asyncio.to_thread(take_frame, frame)
        yield RunEnded(generation=generation, memory=())


def _step(stage: Stage, step: int, total: int, expert: Expert | None) -> StepDone:
    time_s = 0.001 if step else None
    return StepDone(progress=Progress(stage=stage, step=step, total_steps=total, expert=expert, step_time_s=time_s))


def ignore(observation: Observation) -> None:
    pass


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file for the full result")
    parser.add_argument("--latency-runs", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        latency = await latency_figures(options.latency_runs, Path(directory, "tiny"))
    result = {**await stand_in_figures(), **latency}
    for name, value in result.items():
        print(f"{name:<50} {value:>12,.3f}")
    if options.out:
        await asyncio.to_thread(Path(options.out).write_text, json.dumps(result, indent=1), "utf-8")


# ---- stand-in ranks -------------------------------------------------------------------------------------------------


async def stand_in_figures() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        spool = Spool(Path(directory))
        ranks: Any = StandInRanks(spool.directory)
        engine = Engine(CARD, [ranks], spool, options=EngineOptions(), observe=ignore, count_tokens=len)
        await engine.start()
        async with served(engine) as stub:
            events = await events_a_second(stub)
            name = await finished_video(stub)
            one = await chunk_rate(stub, name, 1)
            eight = await chunk_rate(stub, name, 8)
        await engine.stop()
        spool.close()
    return {
        "events a second, one stream": events,
        "chunks to 1 reader, MB/s": one,
        "chunks to 8 readers, MB/s in all": eight,
    }


@asynccontextmanager
async def served(engine: Engine) -> AsyncGenerator[VideoGenerationServiceStub, None]:
    server = build_server(engine, ServerOptions(drain_window_s=0.0, drain_timeout_s=0.0))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield VideoGenerationServiceStub(channel)
    await server.stop()


async def events_a_second(stub: Any) -> float:
    """Messages that one Generate stream carried, while its generation made a step at every turn of the loop."""
    spec = pb.GenerationSpec(prompt="x", width=16, height=16, num_frames=1, num_inference_steps=NUM_STEPS)
    began, count = time.perf_counter(), 0
    async for _ in stub.Generate(GenerateRequest(spec=spec)):
        count += 1
    return count / (time.perf_counter() - began)


async def finished_video(stub: Any) -> str:
    """A raw video of 200 MB that is there to be read."""
    spec = pb.GenerationSpec(
        prompt="x", width=1280, height=720, num_frames=73, output_format=pb.OUTPUT_FORMAT_RAW_RGB24
    )
    spec.num_inference_steps = 1
    name = ""
    async for response in stub.Generate(GenerateRequest(spec=spec)):
        name = response.event.generation
    return name


async def chunk_rate(stub: Any, name: str, num_readers: int) -> float:
    """MB of video a second to all readers, each of which watches the finished generation from its first byte."""

    async def read() -> int:
        request = WatchGenerationRequest(name=name)
        return sum([len(r.event.chunk.data) async for r in stub.WatchGeneration(request)])

    began = time.perf_counter()
    num_bytes = sum(await asyncio.gather(*(read() for _ in range(num_readers))))
    return num_bytes / 1e6 / (time.perf_counter() - began)


# ---- the tiny model -------------------------------------------------------------------------------------------------


async def latency_figures(num_runs: int, model: Path) -> dict[str, float]:
    """model: where a checkpoint with random weights is made, whose videos take next to no time."""
    make_tiny_model(model)
    settings = ServeSettings(cpu_threads=1, model_path=str(model))
    async with composed_engine(settings, EngineOptions(), ignore) as engine, served(engine) as stub:
        await engine.start()
        ways: dict[str, Callable[[int], Any]] = {
            "engine": lambda seed: through_engine(engine, seed),
            "grpc": lambda seed: through_grpc(stub, seed),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for seed in range(num_runs + 1):
            for name, run in ways.items():
                began = time.perf_counter()
                await run(seed)
                if seed:  # the first of each warms up
                    times[name].append(time.perf_counter() - began)
        await engine.drain(0.0)
    engine_s, grpc_s = (statistics.median(times[name]) for name in ("engine", "grpc"))
    ratios = [b / a for a, b in zip(times["engine"], times["grpc"], strict=True)]
    return {
        "tiny video, engine called directly, median ms": engine_s * 1000,
        "tiny video, through gRPC, median ms": grpc_s * 1000,
        "through gRPC / directly, median of pairs": statistics.median(ratios),
    }


async def through_engine(engine: Engine, seed: int) -> None:
    request = GenerationRequest(
        prompt="x", width=32, height=32, num_frames=1, num_inference_steps=4, seed=seed,
        output_format=OutputFormat.RAW_RGB24,
    )  # fmt: skip
    generation = await engine.submit(request, watched=True)
    records = [record async for record in engine.watch(generation.name)]
    assert isinstance(records[-1].event, Completed)


async def through_grpc(stub: Any, seed: int) -> None:
    spec = pb.GenerationSpec(prompt="x", width=32, height=32, num_frames=1, num_inference_steps=4, seed=seed)
    spec.output_format = pb.OUTPUT_FORMAT_RAW_RGB24
    events = [response.event async for response in stub.Generate(GenerateRequest(spec=spec))]
    assert events[-1].HasField("completed")


if __name__ == "__main__":
    asyncio.run(main())
