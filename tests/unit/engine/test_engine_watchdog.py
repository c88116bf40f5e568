"""The executor over a group without processes, in a time that only the tests move on."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from tests.bench import Clock, eventually
from tests.fake_ranks import CARD, MEMORY, ask
from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.images import InputFrames
from wan_grpc.domain.observations import (
    Exchanged,
    GroupRecovered,
    GroupRestarting,
    Observation,
    RankChanged,
    RankFaulted,
    RankMemorySampled,
    RestartCause,
)
from wan_grpc.domain.request import VideoRequest, resolve
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.traffic import Exchange, RankTime, Traffic
from wan_grpc.engine import watchdog
from wan_grpc.engine.executor import Executor, RestartPolicy
from wan_grpc.engine.group import GroupEvent, GroupPlan, LeftBehindError, RanksDied, TakeFrame
from wan_grpc.engine.messages import (
    Cancel,
    FromRank,
    News,
    PreviewMade,
    RankFailed,
    Ready,
    Run,
    RunEnded,
    StepDone,
    ToRank,
)
from wan_grpc.engine.watchdog import Expected, Patience, StepTimes
from wan_grpc.pipeline.checkpoint import Checkpoint

PIDS = (501, 502)
GRACE_S, FIRST_S, LINKS_S = 10.0, 600.0, 2.0
OUT_OF_MEMORY = Failure(reason=Reason.OUT_OF_MEMORY, message="ask for less")
INTERNAL = Failure(reason=Reason.INTERNAL, message="a bug")


class SlowClock(Clock):
    """Real time counts for a tenth, so that a busy machine holds nothing up that a test moves on."""

    def __init__(self) -> None:
        super().__init__()
        self._real, began = self._time, self._time()
        self._time = lambda: began + (self._real() - began) / 10

    def restore(self) -> None:
        self._loop.time = self._real  # type: ignore[method-assign]


class FakeGroup:
    """Ranks that say what a test lets them say."""

    missing: tuple[int, ...] = ()

    def __init__(self, plan: GroupPlan, deliver: Callable[[GroupEvent], None]) -> None:
        self.say = deliver
        self.pids: tuple[int, ...] = ()
        self.heard: list[ToRank] = []
        self.aborted: list[str] = []
        self.take_frame: TakeFrame = lambda _: None
        self.left_behind = ""
        """What does not end; empty: all do."""
        self.is_killed = False
        self.may_read = threading.Event()
        """Until it is set the ranks take nothing in."""
        self.may_read.set()

    def start(self) -> None:
        self.pids = PIDS

    def be_ready(self) -> None:
        """The first has waited for the links all the time that the second took to come to them."""
        for rank, links_s in enumerate((9.0, LINKS_S)):
            ready = Ready(rank=rank, device="cpu", dtype="float32", attention="fake", used_bytes=rank, links_s=links_s)
            self.say(ready)

    def expect_frames(self, frame_bytes: int, take_frame: TakeFrame) -> None:
        self.take_frame = take_frame

    def send(self, message: ToRank) -> None:
        assert self.may_read.wait(10)
        self.heard.append(message)

    def abort(self, generation: str) -> None:
        self.aborted.append(generation)

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.is_killed = True
        self.may_read.set()
        if self.left_behind:
            raise LeftBehindError(self.left_behind)


@dataclass
class Ranks:
    """An executor over fake groups, of which the newest is `group`."""

    executor: Executor
    clock: Clock
    groups: list[FakeGroup]
    observed: list[Observation] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def group(self) -> FakeGroup:
        return self.groups[-1]

    def seen(self, *kinds: type) -> list[Observation]:
        return [observation for observation in self.observed if isinstance(observation, kinds)]

    async def become_ready(self) -> None:
        """The newest group, or the next one, becomes ready."""
        await eventually(lambda: bool(self.group.pids) and not self.group.is_killed, "a group starts")
        self.group.be_ready()
        await self.executor.wait_ready()

    async def begin(self, name: str = "g", **request: object) -> "Computation":
        made = Computation(self, name, resolve(ask(**request), CARD, fallback_seed=0))
        await eventually(lambda: bool(self.group.heard), "the ranks hear of it")
        return made

    async def pass_time(self, seconds: float) -> None:
        """As a process that runs all the while sees it."""
        for _ in range(round(seconds / 0.5)):
            await self.clock.advance(0.5)

    async def given_up_after(self, at_most_s: float) -> float:
        """How long it takes until the ranks are given up, to half a second; they must be."""
        group, waited_s = self.group, 0.0
        while self.executor.is_ready:
            assert waited_s < at_most_s, f"still trusted after {waited_s} s"
            await self.pass_time(0.5)
            waited_s += 0.5
        await eventually(lambda: group.is_killed, "the group is killed")
        return waited_s

    async def are_trusted_for(self, seconds: float) -> None:
        await self.pass_time(seconds)
        assert self.executor.is_ready and not self.group.is_killed


class Computation:
    """One generation on the executor, all of whose messages are kept."""

    def __init__(self, ranks: Ranks, name: str, video: VideoRequest) -> None:
        self.name = name
        self.video = video
        self.frames: list[bytes] = []
        self.messages: list[News] = []
        self._ranks = ranks
        self._task = asyncio.create_task(self._follow(ranks.executor))
        ranks.tasks.append(self._task)

    async def _follow(self, executor: Executor) -> None:
        async for message in executor.run(self.name, self.video, InputFrames(), self._take_frame):
            self.messages.append(message)

    def _take_frame(self, frame: memoryview) -> None:
        self.frames.append(bytes(frame))

    async def say(self, message: FromRank) -> None:
        self._ranks.group.say(message)
        for _ in range(5):
            await asyncio.sleep(0)

    async def step(
        self, stage: Stage, step: int, total: int = 4, *, seconds: float = 0.0, times: tuple[RankTime, ...] = ()
    ) -> None:
        """The ranks take so long, and have then finished this step."""
        await self._ranks.pass_time(seconds)
        time_s = seconds if step else None
        progress = Progress(stage=stage, step=step, total_steps=total, step_time_s=time_s)
        await self.say(StepDone(progress=progress, times=times))

    async def reach(self, stage: Stage, *, seconds: float) -> None:
        """Every step before `stage`, each as long as the next, and the begin of it."""
        for earlier in (Stage.TEXT, Stage.DENOISE, Stage.DECODE):
            await self.step(earlier, 0)
            if earlier is stage:
                return
            for step in range(1, 5):
                await self.step(earlier, step, seconds=seconds)

    async def end(self, failure: Failure | None = None, traffic: tuple[tuple[Traffic, ...], ...] = ()) -> None:
        await self.say(RunEnded(generation=self.name, memory=MEMORY, failure=failure, traffic=traffic))
        await self._task

    async def whole(self, *, seconds: float) -> None:
        """All of it, with steps of this length, to a good end."""
        await self.reach(Stage.DECODE, seconds=seconds)
        for step in range(1, 5):
            await self.step(Stage.DECODE, step, seconds=seconds)
        await self.end()

    async def failure(self) -> Failure:
        with pytest.raises(ServiceError) as caught:
            await self._task
        return caught.value.failure


@asynccontextmanager
async def open_ranks(
    directory: Path, *, first_rank: int = 0, is_ready: bool = True, **policy: float
) -> AsyncIterator[Ranks]:
    plan = GroupPlan(
        topology=Topology(ulysses=2),
        checkpoint=Checkpoint(model_path="fake", directory=None),
        device="cpu",
        dtype="float32",
        load_format="dummy",
        cpu_threads=1,
        max_frame_bytes=1,
        directory=directory,
        first_rank=first_rank,
    )
    groups: list[FakeGroup] = []
    observed: list[Observation] = []

    def make_group(plan: GroupPlan, deliver: Callable[[GroupEvent], None]) -> FakeGroup:
        groups.append(FakeGroup(plan, deliver))
        return groups[-1]

    executor = Executor(
        plan,
        CARD,
        policy=RestartPolicy(patience=Patience(grace_s=GRACE_S, first_step_timeout_s=FIRST_S), **policy),  # type: ignore[arg-type]
        observe=observed.append,
        make_group=make_group,  # type: ignore[arg-type]
    )
    ranks = Ranks(executor=executor, clock=SlowClock(), groups=groups, observed=observed)
    executor.start()
    try:
        await eventually(lambda: bool(groups), "a group starts")
        if is_ready:
            await ranks.become_ready()
        yield ranks
    finally:
        ranks.clock.restore()
        await executor.stop()
        for task in ranks.tasks:
            task.cancel()
        await asyncio.gather(*ranks.tasks, return_exceptions=True)


@pytest.fixture
async def ranks(tmp_path: Path) -> AsyncIterator[Ranks]:
    """Two ranks that are ready and have computed nothing yet."""
    async with open_ranks(tmp_path) as ranks:
        yield ranks


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The processes that are stopped: empty until a test says so."""
    pids: set[int] = set()
    monkeypatch.setattr(watchdog, "is_stopped", pids.__contains__)
    return pids


def within(bound_s: float) -> object:
    """Found out at this time, or at the next look; the real time of a busy machine may have passed, too."""
    return pytest.approx(bound_s, abs=1.0)


def whole_seconds(text: str) -> str:
    """`text` without the fractions, which are of real time or of the next look."""
    return re.sub(r"(\d)\.\d+ s", r"\1 s", text)


# ---- the bound of each step -----------------------------------------------------------------------------------------


async def test_a_first_step_of_which_nothing_is_known(ranks: Ranks) -> None:
    """It may take the whole first-step timeout, and no longer."""
    computation = await ranks.begin()
    await computation.step(Stage.TEXT, 0)
    assert await ranks.given_up_after(700) == within(FIRST_S)
    assert (await computation.failure()).message.startswith("the ranks that computed this video hung: no step came for")


async def test_a_run_that_never_begins(ranks: Ranks) -> None:
    """Ranks that do not even say that they have begun are found by the bound of the first step."""
    await ranks.begin()
    assert await ranks.given_up_after(700) == within(FIRST_S)


async def test_a_later_step(ranks: Ranks) -> None:
    """A step may take three times as long as the one before it, and the grace; its caller hears the figures."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=7.0)
    await computation.step(Stage.DENOISE, 2, seconds=4.0)
    await ranks.are_trusted_for(3 * 4.0 + GRACE_S - 1.0)
    assert await ranks.given_up_after(3) == within(1.0)
    failure = await computation.failure()
    assert failure.reason is Reason.RANK_DIED
    assert failure.retry_after_s == pytest.approx(1.0, abs=0.5)
    assert whole_seconds(failure.message) == (
        "the ranks that computed this video hung: no step came for 22 s, and it was expected within 4 s; "
        "they are being started again"
    )


PREVIEW = PreviewMade(step=1, width=1, height=1, rgb=bytes(3), time_s=20.0)


async def test_a_preview_is_not_of_the_next_step(ranks: Ranks) -> None:
    """The time of a step begins again when a preview is there, and is no longer for it."""
    computation = await ranks.begin(preview_every_steps=1)
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=4.0)
    await ranks.pass_time(20.0)
    await computation.say(PREVIEW)
    await ranks.are_trusted_for(3 * 4.0 + GRACE_S - 1.0)
    assert await ranks.given_up_after(3) == within(1.0)
    told = whole_seconds((await computation.failure()).message)
    assert "no step came for 22 s, and it was expected within 4 s" in told
    assert computation.messages[-1] == PREVIEW


async def test_a_preview_has_the_time_of_decoding(ranks: Ranks) -> None:
    """Beside that of the step: of three slices where one was timed, and else of a first step; not where none is due."""
    computation = await ranks.begin(preview_every_steps=2)
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=4.0)
    await computation.step(Stage.DENOISE, 2, seconds=4.0)
    await ranks.are_trusted_for(3 * 4.0 + GRACE_S + FIRST_S - 1.0)
    await computation.say(PREVIEW)
    for step in (3, 4):
        await computation.step(Stage.DENOISE, step, seconds=4.0)
    await computation.say(PREVIEW)
    await computation.step(Stage.DECODE, 0)
    for step in range(1, 5):
        await computation.step(Stage.DECODE, step, seconds=8.0)
    await computation.end()
    again = await ranks.begin("h", preview_every_steps=2)
    await again.reach(Stage.DENOISE, seconds=1.0)
    await again.step(Stage.DENOISE, 1, seconds=4.0)
    await again.step(Stage.DENOISE, 2, seconds=4.0)
    assert await ranks.given_up_after(200) == within(3 * 4.0 + GRACE_S + 3 * 3 * 8.0 + GRACE_S)


async def test_no_preview_is_told_after_a_failure(ranks: Ranks) -> None:
    """The failure is what is told, and then the end."""
    computation = await ranks.begin(preview_every_steps=1)
    await computation.reach(Stage.DENOISE, seconds=1.0)
    failed = RankFailed(generation=computation.name, rank=1, failure=INTERNAL)
    for message in (failed, PREVIEW):
        await computation.say(message)
    await computation.end(INTERNAL)
    assert [type(message) for message in computation.messages[-2:]] == [RankFailed, RunEnded]
    assert PREVIEW not in computation.messages


async def test_a_first_step_learned_from_an_earlier_generation(ranks: Ranks) -> None:
    """The next video of the same size has the time that the longest step of the stage took before."""
    await (await ranks.begin()).whole(seconds=2.0)
    computation = await ranks.begin("h")
    await computation.step(Stage.TEXT, 0)
    await computation.step(Stage.TEXT, 1, 1)
    await computation.step(Stage.DENOISE, 0)
    assert await ranks.given_up_after(30) == within(3 * 2.0 + GRACE_S)


async def test_a_larger_video_has_more_time(ranks: Ranks) -> None:
    """Twice the pixels have four times as long at their first step."""
    await (await ranks.begin()).whole(seconds=2.0)
    computation = await ranks.begin("h", width=32)
    await computation.step(Stage.DENOISE, 0)
    assert await ranks.given_up_after(60) == within(3 * 8.0 + GRACE_S)


VIDEO = {"width": 832, "height": 480, "num_frames": 81}
PICTURE = {**VIDEO, "num_frames": 1}


async def test_a_video_after_a_picture(ranks: Ranks) -> None:
    """What a picture took is no measure of a video: it has the time of a step that was never timed, and no more."""
    await (await ranks.begin(**PICTURE)).whole(seconds=2.0)
    computation = await ranks.begin("h", **VIDEO)
    await computation.step(Stage.DENOISE, 0)
    assert await ranks.given_up_after(700) == within(FIRST_S + GRACE_S)
    assert "610 s are allowed for a step of which only smaller ones were timed" in (await computation.failure()).message
    assert ranks.seen(GroupRestarting)[0].detail.endswith(" (--first-step-timeout-s)")  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_failure", [False, True], ids=["cancel", "failure"])
async def test_leaving_a_video_after_a_picture(ranks: Ranks, is_failure: bool) -> None:
    """Ranks that do not come out of its first step are found in the same time."""
    await (await ranks.begin(**PICTURE)).whole(seconds=2.0)
    computation = await ranks.begin("h", **VIDEO)
    await computation.step(Stage.DENOISE, 0)
    if is_failure:
        await computation.say(RankFailed(generation="h", rank=1, failure=INTERNAL))
    else:
        ranks.executor.cancel("h")
    links_s = 3 * LINKS_S if is_failure else 0.0
    assert await ranks.given_up_after(700) == within(FIRST_S + GRACE_S + links_s)


async def test_decoding_a_video_after_a_picture(ranks: Ranks) -> None:
    """A slice has four pictures at most: sixteen times what the picture took is expected, however long the video."""
    await (await ranks.begin(**PICTURE)).whole(seconds=2.0)
    computation = await ranks.begin("h", **VIDEO)
    await computation.step(Stage.DECODE, 0)
    assert await ranks.given_up_after(200) == within(3 * 16 * 2.0 + GRACE_S)


async def test_a_step_that_takes_longer_than_the_first_may(ranks: Ranks) -> None:
    """What was measured of the same size is granted, beyond the time for a step of which nothing is known."""
    times, video = StepTimes(), resolve(ask(), CARD, fallback_seed=0)
    times.learn(Stage.DENOISE, video, 900.0, is_first=True)
    expected = times.expect(Stage.DENOISE, video, is_first=True)
    assert Patience().bound_s(expected) == 3 * 900.0 + 10.0


async def test_a_new_size_on_warm_ranks(ranks: Ranks) -> None:
    """Libraries choose their kernels for each shape: the first time of a size has what first times took."""
    first = await ranks.begin()
    await first.reach(Stage.DENOISE, seconds=1.0)
    for step, seconds in enumerate((20.0, 1.0, 1.0, 1.0), start=1):
        await first.step(Stage.DENOISE, step, seconds=seconds)
    await first.end()
    await (await ranks.begin("h")).whole(seconds=1.0)
    computation = await ranks.begin("i", num_frames=1)
    await computation.step(Stage.DENOISE, 0)
    assert await ranks.given_up_after(100) == within(3 * 20.0 + GRACE_S)


async def test_a_smaller_video_has_no_less_time(ranks: Ranks) -> None:
    """A quarter of the pixels is not relied on to take less."""
    await (await ranks.begin(width=32, height=64)).whole(seconds=2.0)
    computation = await ranks.begin("h")
    await computation.step(Stage.DENOISE, 0)
    assert await ranks.given_up_after(60) == within(3 * 2.0 + GRACE_S)


async def test_the_first_slices_of_a_decoder_tell_little(ranks: Ranks) -> None:
    """After the slice of one picture the next, of four, is not yet known; after that it is."""
    computation = await ranks.begin()
    await computation.reach(Stage.DECODE, seconds=0.5)
    await computation.step(Stage.DECODE, 1, seconds=10.0)
    await computation.step(Stage.DECODE, 2, seconds=100.0)
    assert await ranks.given_up_after(400) == within(3 * 100.0 + GRACE_S)


async def test_a_text_that_was_known_tells_nothing(ranks: Ranks) -> None:
    """A prompt out of the cache costs no time; the next one may cost what a prompt has cost before."""
    await (await ranks.begin()).whole(seconds=4.0)
    await (await ranks.begin("h")).whole(seconds=0.0)
    computation = await ranks.begin("i")
    await computation.step(Stage.TEXT, 0, 2)
    await computation.step(Stage.TEXT, 1, 2)
    assert await ranks.given_up_after(60) == within(3 * 4.0 + GRACE_S)


async def test_the_end_of_a_run(ranks: Ranks) -> None:
    """What lies after the last step has a bound, too: that of the last step."""
    computation = await ranks.begin()
    await computation.reach(Stage.DECODE, seconds=1.0)
    for step in range(1, 5):
        await computation.step(Stage.DECODE, step, seconds=2.0)
    assert await ranks.given_up_after(30) == within(3 * 2.0 + GRACE_S)


async def test_new_ranks_take_as_long_as_new_ranks_did(ranks: Ranks) -> None:
    """The first steps after a restart warm up again, and have the time that the first of all had."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    for step, seconds in enumerate((20.0, 1.0, 1.0, 1.0), start=1):
        await computation.step(Stage.DENOISE, step, seconds=seconds)
    await computation.end()
    await (await ranks.begin("h")).whole(seconds=1.0)
    ranks.group.say(RanksDied(detail="rank 0 was killed by SIGKILL"))
    await eventually(lambda: len(ranks.groups) == 2, "a new group starts")
    await ranks.become_ready()
    computation = await ranks.begin("i")
    await computation.step(Stage.DENOISE, 0)
    assert await ranks.given_up_after(100) == within(3 * 20.0 + GRACE_S)


async def test_a_generation_that_ended_early_teaches_what_it_did(ranks: Ranks) -> None:
    """The steps of a failed generation count; a stage of which it saw only the beginning stays unknown."""
    computation = await ranks.begin()
    await computation.reach(Stage.DECODE, seconds=1.0)
    await computation.step(Stage.DECODE, 1, seconds=0.5)
    await computation.end(failure=INTERNAL)
    computation = await ranks.begin("h")
    await computation.step(Stage.DENOISE, 0)
    await computation.step(Stage.DENOISE, 1, seconds=3 * 1.0 + GRACE_S - 1.0)
    await computation.step(Stage.DECODE, 0)
    assert await ranks.given_up_after(700) == within(FIRST_S)


# ---- leaving --------------------------------------------------------------------------------------------------------


async def test_a_cancel(ranks: Ranks) -> None:
    """From the cancel on the ranks have the bound of the step under way for leaving, however many steps they tell."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=2.0)
    await ranks.pass_time(10.0)
    ranks.executor.cancel("g")
    await computation.step(Stage.DENOISE, 2, seconds=2.0)
    await computation.step(Stage.DENOISE, 3, seconds=2.0)
    assert await ranks.given_up_after(30) == within(3 * 2.0 + GRACE_S - 4.0)
    assert "no end after a cancel came for 16 s" in whole_seconds((await computation.failure()).message)
    await eventually(lambda: ranks.groups[0].heard[1:] == [Cancel(generation="g")])
    assert ranks.seen(GroupRestarting)[0].cause is RestartCause.RANK_HUNG  # type: ignore[attr-defined]


async def test_a_cancel_that_is_heeded(ranks: Ranks) -> None:
    """Ranks that leave in time live, and the next generation has its own clock."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=2.0)
    ranks.executor.cancel("g")
    await ranks.are_trusted_for(15.0)
    await computation.say(RunEnded(generation="g", memory=MEMORY, cancelled=True))
    await ranks.are_trusted_for(100.0)
    computation = await ranks.begin("h")
    await ranks.are_trusted_for(10.0)
    await computation.whole(seconds=1.0)


async def test_a_failure_on_one_rank(ranks: Ranks) -> None:
    """It is passed on at once, the others are called out, no step is told after it, and all end alive."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    num_before = len(computation.messages)
    failed = RankFailed(generation="g", rank=1, failure=OUT_OF_MEMORY)
    await computation.say(failed)
    assert (computation.messages[num_before:], ranks.group.aborted) == ([failed], ["g"])
    await computation.step(Stage.DENOISE, 1)
    await computation.say(RankFailed(generation="g", rank=0, failure=INTERNAL))
    await ranks.are_trusted_for(4.0)
    await computation.end(failure=OUT_OF_MEMORY)
    assert computation.messages[num_before:] == [
        failed,
        RunEnded(generation="g", memory=MEMORY, failure=OUT_OF_MEMORY),
    ]
    assert ranks.group.aborted == ["g"]
    assert ranks.seen(RankFaulted) == [
        RankFaulted(rank=1, reason=Reason.OUT_OF_MEMORY),
        RankFaulted(rank=0, reason=Reason.INTERNAL),
    ]
    assert ranks.seen(GroupRecovered) == [GroupRecovered(cause=None, seconds=pytest.approx(4.0, abs=0.5))]
    await (await ranks.begin("h")).whole(seconds=1.0)


async def test_of_two_failures_the_caller_hears_the_one_he_can_mend(ranks: Ranks) -> None:
    """Out of memory is told, when it is known before anything was told; only one failure is."""
    computation = await ranks.begin()
    await computation.step(Stage.TEXT, 0)
    memory = RankFailed(generation="g", rank=1, failure=OUT_OF_MEMORY)
    ranks.group.say(RankFailed(generation="g", rank=0, failure=INTERNAL))
    ranks.group.say(memory)
    await computation.end(failure=OUT_OF_MEMORY)
    assert [message for message in computation.messages if isinstance(message, RankFailed)] == [memory]


async def test_a_failure_from_which_the_others_do_not_come_out(ranks: Ranks) -> None:
    """After the bound of the step under way, and of new links, the group is killed.

    The time of the recovery counts from the failure.
    """
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=2.0)
    await ranks.pass_time(5.0)
    await computation.say(RankFailed(generation="g", rank=1, failure=INTERNAL))
    assert await ranks.given_up_after(40) == within(3 * 2.0 + 3 * LINKS_S + GRACE_S)
    (restarting,) = ranks.seen(GroupRestarting)
    assert isinstance(restarting, GroupRestarting)
    assert restarting.cause is RestartCause.EXCHANGE_FAILED
    assert whole_seconds(restarting.detail) == (
        "no end after a failure on one rank came for 22 s, and it was expected within 2 s "
        "(allowed are 3 times that and --watchdog-grace-s 10, and 6 s for new links between the ranks)"
    )
    assert (await computation.failure()).reason is Reason.RANK_DIED
    await eventually(lambda: len(ranks.groups) == 2, "a new group starts")
    await ranks.pass_time(20.0)
    await ranks.become_ready()
    assert ranks.seen(GroupRecovered) == [
        GroupRecovered(cause=RestartCause.EXCHANGE_FAILED, seconds=pytest.approx(42.0, abs=2.0))
    ]


async def test_new_links_have_their_time_once(ranks: Ranks) -> None:
    """A cancel of the next generation finds the bound of its step alone."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=2.0)
    await computation.say(RankFailed(generation="g", rank=1, failure=INTERNAL))
    await ranks.are_trusted_for(3 * 2.0 + GRACE_S + LINKS_S)
    await computation.end(INTERNAL)
    computation = await ranks.begin("h")
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=2.0)
    ranks.executor.cancel("h")
    assert await ranks.given_up_after(40) == within(3 * 2.0 + GRACE_S)


async def test_a_failure_that_comes_after_the_end(ranks: Ranks) -> None:
    """What another pipe brings late neither calls anybody out nor reaches the next generation."""
    computation = await ranks.begin()
    await computation.step(Stage.TEXT, 0)
    await computation.end(failure=INTERNAL)
    late = RankFailed(generation="g", rank=1, failure=INTERNAL)
    ranks.group.say(late)
    following = await ranks.begin("h")
    await following.say(late)
    await following.whole(seconds=1.0)
    assert ranks.group.aborted == []
    assert not [message for message in following.messages if isinstance(message, RankFailed)]


async def test_a_death_after_a_failure(ranks: Ranks) -> None:
    """Ranks that die on their way out are started again; whoever follows them heard the failure first."""
    computation = await ranks.begin()
    await computation.step(Stage.TEXT, 0)
    failed = RankFailed(generation="g", rank=1, failure=INTERNAL)
    await computation.say(failed)
    await computation.say(RanksDied(detail="rank 1 exited with code 1"))  # type: ignore[arg-type]
    assert (await computation.failure()).message == (
        "the ranks that computed this video ended: rank 1 exited with code 1; they are being started again"
    )
    assert computation.messages[-1] == failed
    await eventually(lambda: bool(ranks.seen(GroupRestarting)))
    assert ranks.seen(GroupRestarting)[0].cause is RestartCause.RANK_DIED  # type: ignore[attr-defined]


# ---- what is no hang ------------------------------------------------------------------------------------------------


async def test_frames_are_progress(ranks: Ranks) -> None:
    """Pictures that come one by one keep the ranks trusted, however long they are between two steps."""
    computation = await ranks.begin()
    await computation.reach(Stage.DECODE, seconds=1.0)
    for step in range(1, 5):
        await computation.step(Stage.DECODE, step, seconds=1.0)
    for _ in range(10):
        await ranks.are_trusted_for(10.0)
        await asyncio.to_thread(ranks.group.take_frame, memoryview(b"x"))
    assert computation.frames == [b"x"] * 10
    assert await ranks.given_up_after(20) == within(3 * 1.0 + GRACE_S)


async def test_a_slow_disk_is_no_hang(ranks: Ranks) -> None:
    """While the server itself is at a frame the ranks wait for it; their time starts when it is done."""
    computation = await ranks.begin()
    disk = threading.Event()
    computation._take_frame = lambda _: disk.wait(30)  # type: ignore[assignment, method-assign, return-value]
    ranks.group.take_frame = ranks.executor._watchdog.watched(computation._take_frame)
    await computation.reach(Stage.DECODE, seconds=1.0)
    await computation.step(Stage.DECODE, 4, seconds=1.0)
    writing = asyncio.create_task(asyncio.to_thread(ranks.group.take_frame, memoryview(b"x")))
    await eventually(lambda: ranks.executor._watchdog._is_taking)
    await ranks.are_trusted_for(1000.0)
    disk.set()
    await writing
    assert await ranks.given_up_after(20) == within(3 * 1.0 + GRACE_S)


async def test_a_server_that_was_held_up_itself(ranks: Ranks) -> None:
    """Time in which this process did not run does not count against the ranks, which may have spoken meanwhile."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=1.0)
    await ranks.clock.advance(3600.0)
    await ranks.are_trusted_for(12.0)
    await computation.step(Stage.DENOISE, 2)
    await computation.step(Stage.DENOISE, 3, seconds=1.0)


async def test_idle_ranks_owe_nothing(ranks: Ranks) -> None:
    """Between two generations, and before the first, nothing is expected."""
    await ranks.are_trusted_for(2000.0)
    await (await ranks.begin()).whole(seconds=1.0)
    await ranks.are_trusted_for(2000.0)


async def test_pictures_for_ranks_that_read_nothing(ranks: Ranks) -> None:
    """A pipe that a rank does not empty holds up neither the server's loop nor a cancel; the watchdog ends it."""
    ranks.group.may_read.clear()
    computation = Computation(ranks, "g", resolve(ask(), CARD, fallback_seed=0))
    await ranks.are_trusted_for(5.0)
    ranks.executor.cancel("g")
    assert await ranks.given_up_after(700) == within(FIRST_S)
    assert (await computation.failure()).reason is Reason.RANK_DIED
    await eventually(lambda: [type(message) for message in ranks.groups[0].heard] == [Run, Cancel])


# ---- ranks that are stopped -----------------------------------------------------------------------------------------


async def test_an_idle_rank_that_is_stopped(ranks: Ranks, stopped: set[int]) -> None:
    """It is found after the grace, with its name; one that goes on in time is left alone."""
    stopped.add(PIDS[1])
    await ranks.are_trusted_for(GRACE_S - 1.5)
    stopped.clear()
    await ranks.are_trusted_for(GRACE_S)
    stopped.add(PIDS[1])
    assert await ranks.given_up_after(20) == within(GRACE_S)
    (restarting,) = ranks.seen(GroupRestarting)
    assert restarting.cause is RestartCause.RANK_HUNG  # type: ignore[attr-defined]
    assert restarting.detail.startswith("rank 1 (process 502) did not run for 1")  # type: ignore[attr-defined]


async def test_a_stopped_rank_of_another_group(tmp_path: Path, stopped: set[int]) -> None:
    """It is named by the number that all groups share."""
    async with open_ranks(tmp_path, first_rank=4) as ranks:
        stopped.add(PIDS[1])
        await ranks.given_up_after(20)
        (restarting,) = ranks.seen(GroupRestarting)
        assert restarting.detail.startswith("rank 5 (process 502) did not run for 1")  # type: ignore[attr-defined]


async def test_a_stopped_rank_at_a_step_that_is_unknown(ranks: Ranks, stopped: set[int]) -> None:
    """Where no time of a step tells anything, a rank that is stopped does."""
    computation = await ranks.begin()
    await computation.step(Stage.TEXT, 0)
    stopped.update(PIDS)
    assert await ranks.given_up_after(20) == within(GRACE_S)
    assert "rank 0 (process 501) and rank 1 (process 502) did not run for" in (await computation.failure()).message


async def test_a_stopped_rank_at_a_step_that_is_known(ranks: Ranks, stopped: set[int]) -> None:
    """It is found after the grace, however long the step may take."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=40.0)
    stopped.add(PIDS[1])
    assert await ranks.given_up_after(20) == within(GRACE_S)
    assert "rank 1 (process 502) did not run for 1" in (await computation.failure()).message
    assert ranks.seen(GroupRestarting)[0].detail.endswith("debugger (--watchdog-grace-s 10)")  # type: ignore[attr-defined]


async def test_a_stopped_rank_whose_silence_is_noticed_first(ranks: Ranks, stopped: set[int]) -> None:
    """It is named."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=1.0)
    await ranks.pass_time(6.0)
    stopped.add(PIDS[1])
    assert await ranks.given_up_after(20) == within(7.0)
    assert "it was expected within 1 s; rank 1 (process 502) is stopped" in (await computation.failure()).message


def test_a_process_that_is_stopped() -> None:
    """The operating system tells one that is stopped from one that sleeps, and from one that is gone."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not watchdog.is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            pass
        assert watchdog.is_stopped(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not watchdog.is_stopped(process.pid)


# ---- the way back ---------------------------------------------------------------------------------------------------


async def test_the_way_back(ranks: Ranks) -> None:
    """Ranks that hang are red at once and killed, then new ones are green; the time between is told."""
    computation = await ranks.begin()
    await computation.reach(Stage.DENOISE, seconds=1.0)
    await computation.step(Stage.DENOISE, 1, seconds=1.0)
    hung, before = ranks.group, len(ranks.observed)
    red: list[bool] = []
    kill = hung.kill

    def note_and_kill() -> None:
        red.append(not ranks.executor.is_ready)
        kill()

    hung.kill = note_and_kill  # type: ignore[method-assign]
    await ranks.given_up_after(20)
    assert red == [True]
    assert (await computation.failure()).reason is Reason.RANK_DIED
    await eventually(lambda: len(ranks.groups) == 2, "a new group starts")
    await ranks.pass_time(7.0)
    await ranks.become_ready()
    told = [
        replace(each, detail=whole_seconds(each.detail)) if isinstance(each, GroupRestarting) else each
        for each in ranks.observed[before:]
        if isinstance(each, RankChanged | GroupRestarting | GroupRecovered)
    ]
    allowed = "allowed are 3 times that and --watchdog-grace-s 10"
    detail = f"no step came for 13 s, and it was expected within 1 s ({allowed})"
    assert told == [
        RankChanged(rank=0, up=False),
        RankChanged(rank=1, up=False),
        GroupRestarting(cause=RestartCause.RANK_HUNG, detail=detail),
        RankChanged(rank=0, up=True),
        RankChanged(rank=1, up=True),
        GroupRecovered(cause=RestartCause.RANK_HUNG, seconds=pytest.approx(7.0, abs=0.5)),
    ]
    await (await ranks.begin("h")).whole(seconds=1.0)
    await ranks.are_trusted_for(100.0)


async def test_a_start_that_fails_belongs_to_the_same_trouble(ranks: Ranks) -> None:
    """The time of a recovery runs from the first cause to the ranks that are ready at last."""
    ranks.group.say(RanksDied(detail="rank 0 was killed by SIGKILL"))
    await eventually(lambda: len(ranks.groups) == 2, "a new group starts")
    await ranks.pass_time(3.0)
    ranks.group.say(RanksDied(detail="rank 0 exited with code 1"))
    await eventually(lambda: len(ranks.seen(GroupRestarting)) == 2)
    await ranks.pass_time(4.0)  # of which one is waited for before the next try
    await eventually(lambda: len(ranks.groups) == 3, "a new group starts")
    await ranks.become_ready()
    assert ranks.seen(GroupRecovered) == [
        GroupRecovered(cause=RestartCause.RANK_DIED, seconds=pytest.approx(7.0, abs=0.5))
    ]


async def test_ranks_that_die_as_the_last_becomes_ready(tmp_path: Path) -> None:
    """Nobody is given ranks that are gone: who waits for ready ones has those of the next group."""
    async with open_ranks(tmp_path, is_ready=False) as ranks:
        await eventually(lambda: bool(ranks.group.pids), "a group starts")
        computation = Computation(ranks, "g", resolve(ask(), CARD, fallback_seed=0))
        ranks.group.be_ready()
        ranks.group.say(RanksDied(detail="rank 1 was killed by SIGKILL"))
        await eventually(lambda: ranks.groups[0].is_killed, "the group is killed")
        assert not ranks.executor.is_ready and ranks.groups[0].heard == []
        await ranks.pass_time(2.0)
        await eventually(lambda: len(ranks.groups) == 2, "a new group starts")
        await ranks.become_ready()
        await eventually(lambda: bool(ranks.group.heard), "the ranks hear of it")
        await computation.whole(seconds=1.0)


@pytest.mark.parametrize("is_start", [False, True], ids=["at work", "while starting"])
async def test_a_process_that_does_not_end(tmp_path: Path, is_start: bool) -> None:
    """Nothing can be started beside it: these ranks are given up, and whoever stops them is not held up."""
    async with open_ranks(tmp_path, is_ready=not is_start) as ranks:
        await eventually(lambda: bool(ranks.group.pids), "a group starts")
        ranks.group.left_behind = "rank 1 (process 502) does not end"
        ranks.group.say(RanksDied(detail="rank 0 was killed by SIGKILL"))
        assert await asyncio.wait_for(ranks.executor.fatal, 100) == "rank 1 (process 502) does not end"
        assert len(ranks.groups) == 1


async def test_a_process_that_does_not_end_at_the_stop(ranks: Ranks) -> None:
    """The stop of the executor comes to its end."""
    ranks.group.left_behind = "rank 1 (process 502) does not end"
    await asyncio.wait_for(ranks.executor.stop(), 100)
    assert ranks.group.is_killed


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ((1,), "ranks of other hosts (1) have"),
        ((2, 5, 6), "ranks of other hosts (2, 5, 6) have"),
        (tuple(range(1, 8)), "ranks 1 to 7 of other hosts have"),
    ],
)
async def test_other_hosts_that_do_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[int, ...], named: str
) -> None:
    """They are waited for with one group after another, as often as it takes, and named."""
    monkeypatch.setattr(FakeGroup, "missing", missing)
    async with open_ranks(tmp_path, is_ready=False, max_failures=2, start_timeout_s=5.0) as ranks:
        while len(ranks.seen(GroupRestarting)) < 4:
            await ranks.pass_time(1.0)
        assert not ranks.executor.fatal.done()
        assert ranks.seen(GroupRestarting)[3] == GroupRestarting(
            cause=RestartCause.START_FAILED, detail=f"{named} not joined within --start-timeout-s 5"
        )


# ---- what is measured -----------------------------------------------------------------------------------------------


async def test_what_ranks_say_of_themselves(tmp_path: Path) -> None:
    """The busiest rank of a step, memory, traffic and failures are told with the numbers that all groups share."""
    async with open_ranks(tmp_path, first_rank=4) as ranks:
        computation = await ranks.begin()
        times = (RankTime(seconds=2.0, waited_s=1.5), RankTime(seconds=2.0, waited_s=0.25))
        await computation.step(Stage.DENOISE, 1, times=times)
        await computation.step(Stage.DENOISE, 2, times=times[:1])
        await computation.say(RankFailed(generation="other", rank=1, failure=INTERNAL))
        traffic = (Traffic(kind=Exchange.ULYSSES, seconds=1.5, sent_bytes=10),)
        await computation.end(traffic=(traffic, (*traffic, Traffic(kind=Exchange.CFG, seconds=0.5, sent_bytes=20))))
        told = [message.progress for message in computation.messages if isinstance(message, StepDone)]
        assert [(progress.slowest_rank, progress.slowest_rank_time_s) for progress in told] == [(5, 1.75), (None, None)]
        assert ranks.seen(Exchanged, RankFaulted) == [
            RankFaulted(rank=5, reason=Reason.INTERNAL),
            Exchanged(rank=4, kind=Exchange.ULYSSES, seconds=1.5, sent_bytes=10),
            Exchanged(rank=5, kind=Exchange.ULYSSES, seconds=1.5, sent_bytes=10),
            Exchanged(rank=5, kind=Exchange.CFG, seconds=0.5, sent_bytes=20),
        ]
        assert [each.rank for each in ranks.seen(RankMemorySampled, RankChanged)] == [4, 5] * 3  # type: ignore[attr-defined]


def test_a_stage_that_was_never_timed() -> None:
    """Nothing is expected of it; after that the first time of a group stands in for every later one."""
    times, video = StepTimes(), resolve(ask(), CARD, fallback_seed=0)
    assert times.expect(Stage.DENOISE, video, is_first=False) is None
    times.learn(Stage.DENOISE, video, 5.0, is_first=True)
    times.learn(Stage.DENOISE, video, 3.0, is_first=True)
    assert times.expect(Stage.DENOISE, video, is_first=False) == Expected(seconds=5.0, measured_s=5.0)
    times.learn(Stage.DENOISE, video, 1.0, is_first=False)
    assert times.expect(Stage.DENOISE, video, is_first=False) == Expected(seconds=1.0, measured_s=1.0)
    assert times.expect(Stage.DENOISE, video, is_first=True) == Expected(seconds=5.0, measured_s=5.0)


@pytest.mark.parametrize("stage", [Stage.TEXT, Stage.DENOISE])
def test_an_outlier_is_forgotten(stage: Stage) -> None:
    """Once it is none of the last three, it counts no longer; texts that cost nothing displace none that did."""
    times, video = StepTimes(), resolve(ask(), CARD, fallback_seed=0)
    for seconds in (500.0, 3.0, 2.0):
        times.learn(stage, video, seconds, is_first=True)
    assert times.expect(stage, video, is_first=True) == Expected(seconds=500.0, measured_s=500.0)
    times.learn(stage, video, 2.0, is_first=True)
    assert times.expect(stage, video, is_first=True) == Expected(seconds=3.0, measured_s=3.0)
    for _ in range(3):
        times.learn(Stage.TEXT, video, 0.01, is_first=True)
    assert times.expect(stage, video, is_first=True) == Expected(seconds=3.0, measured_s=3.0)


def test_each_size_has_its_own_times() -> None:
    """A picture between two videos takes nothing from what is known of them, and only so many sizes are kept."""
    times = StepTimes()
    picture, video = (resolve(ask(num_frames=n), CARD, fallback_seed=0) for n in (1, 81))
    times.learn(Stage.DENOISE, picture, 1.0, is_first=False)
    assert times.expect(Stage.DENOISE, video, is_first=False) == Expected(seconds=441.0, measured_s=1.0)
    times.learn(Stage.DENOISE, video, 60.0, is_first=False)
    times.learn(Stage.DENOISE, picture, 2.0, is_first=False)
    assert times.expect(Stage.DENOISE, video, is_first=False) == Expected(seconds=60.0, measured_s=60.0)
    for width in range(16, 16 * 41, 16):
        other = resolve(ask(num_frames=1, width=width), CARD, fallback_seed=0)
        times.learn(Stage.DENOISE, other, 1.0, is_first=False)
    (sizes,) = times._longest.values()
    assert len(sizes) == 32
