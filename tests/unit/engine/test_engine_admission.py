import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.bench import Bench
from tests.fake_ranks import CARD, ask, raw_video
from wan_grpc.domain.errors import Failure, InvalidRequestError, Reason, ServiceError
from wan_grpc.domain.events import Accepted, Generation, Queued, Record, Stage, State
from wan_grpc.domain.observations import Admitted, Ended, LoadChanged, Refused
from wan_grpc.domain.request import UNLIMITED_S, resolve

OpenAnother = Callable[..., Awaitable[Bench]]
ID = "7d9c1f70-4c1e-4b5c-9d5f-0a1b2c3d4e5f"


async def refusal(work: Awaitable[object]) -> Failure:
    with pytest.raises(ServiceError) as caught:
        await work
    return caught.value.failure


async def records_of(bench: Bench, name: str) -> list[Record]:
    """All that happened to a generation that has ended."""
    return (await bench.watch(name).to_end()).records


async def test_a_refused_request_names_every_field_and_leaves_nothing(bench: Bench) -> None:
    """All violations come at once, and the request takes no place in line and no name."""
    with pytest.raises(InvalidRequestError) as caught:
        await bench.submit(prompt=" ", width=17, num_frames=6)
    assert [violation.field for violation in caught.value.violations] == [
        "spec.prompt",
        "spec.width",
        "spec.num_frames",
    ]
    assert bench.engine.list(page_size=10, after_name=None, states=frozenset()) == ((), False)
    assert bench.observed == [Refused(reason=Reason.INVALID_REQUEST)]


async def test_a_stopping_engine_still_names_what_is_wrong(bench: Bench) -> None:
    """A request that can never be served is told so, whatever state the server is in."""
    await bench.engine.drain(0.0)
    assert (await refusal(bench.submit(prompt=""))).reason is Reason.INVALID_REQUEST
    assert (await refusal(bench.submit())).reason is Reason.SHUTTING_DOWN


async def test_a_seed_is_drawn_when_none_is_asked_for(bench: Bench) -> None:
    """Two requests without a seed get two seeds, which are told at once."""
    first, second = await bench.submit(seed=None), await bench.submit(seed=None)
    assert first.video.seed != second.video.seed
    assert 0 <= first.video.seed < 2**32


async def test_what_is_accepted_is_told_with_its_bounds(bench: Bench) -> None:
    """The first record, and the resource, repeat every value as resolved and the bounds of the job."""
    generation = await bench.submit(max_duration_s=90.0, detach_grace_s=UNLIMITED_S)
    video = resolve(ask(), CARD, fallback_seed=0)
    assert generation == Generation(
        name=generation.name,
        state=State.QUEUED,
        video=video,
        created_s=generation.created_s,
        queue_position=0,
        max_duration_s=90.0,
        detach_grace_s=UNLIMITED_S,
    )
    await bench.engine.cancel(generation.name)
    first = (await records_of(bench, generation.name))[0]
    accepted = Accepted(name=generation.name, video=video, max_duration_s=90.0, detach_grace_s=UNLIMITED_S)
    assert first == Record(sequence=1, time_s=first.time_s, event=accepted)


@pytest.mark.parametrize(
    ("watched", "asked_s", "told_s"), [(True, None, 15.0), (False, None, UNLIMITED_S), (True, 0.0, 0.0)]
)
async def test_the_grace_that_holds_is_told(bench: Bench, watched: bool, asked_s: float | None, told_s: float) -> None:
    """The server's grace for a caller who watches, none for one who does not, unless the request has its own."""
    assert (await bench.submit(watched=watched, detach_grace_s=asked_s)).detach_grace_s == told_s


async def test_two_hundred_at_once_on_a_line_of_sixteen(another: OpenAnother) -> None:
    """One runs, 16 wait, 183 are refused at once with a time; each accepted one ends well, exactly once."""
    bench = await another(max_queue=16)
    first = await bench.submit(watched=False, prompt="0")
    await bench.executor.run_number(1)
    answers = await asyncio.gather(
        *(bench.submit(watched=False, prompt=str(number)) for number in range(1, 200)), return_exceptions=True
    )
    accepted = [first, *(answer for answer in answers if isinstance(answer, Generation))]
    refused = [answer.failure for answer in answers if isinstance(answer, ServiceError)]
    sentence = "16 generations wait behind the one that is next; no more are accepted now"
    assert [generation.video.prompt for generation in accepted] == [str(number) for number in range(17)]
    assert refused == [Failure(reason=Reason.QUEUE_FULL, message=sentence, retry_after_s=5.0)] * 183
    for number in range(1, 18):
        (await bench.executor.run_number(number)).finish()
    for generation in accepted:
        await bench.ended(generation.name)
        watcher = await bench.watch(generation.name).to_end()
        assert watcher.video == raw_video(generation.video)
    assert [run.generation for run in bench.executor.runs] == [generation.name for generation in accepted]
    assert sorted((ended.name, ended.state) for ended in bench.seen(Ended)) == sorted(
        (generation.name, State.SUCCEEDED) for generation in accepted
    )
    assert len(bench.seen(Admitted)) == 17
    assert bench.seen(LoadChanged)[-1] == LoadChanged(num_queued=0, num_running=0, num_watchers=0)


async def test_the_line_is_as_long_while_the_ranks_are_starting(another: OpenAnother) -> None:
    """One more than may wait is accepted before the ranks are ready too: it is the one that will run."""
    bench = await another(max_queue=2, is_ready=False)
    names = [(await bench.submit(watched=False)).name for _ in range(3)]
    assert (await refusal(bench.submit())).reason is Reason.QUEUE_FULL
    assert bench.states(*names) == [State.QUEUED] * 3
    bench.executor.set_ready(True)
    await bench.executor.run_number(1)
    assert bench.states(*names) == [State.RUNNING, State.QUEUED, State.QUEUED]


async def test_a_place_is_free_as_soon_as_somebody_leaves(another: OpenAnother) -> None:
    """A cancel in the line makes room in it at once."""
    bench = await another(max_queue=1)
    await bench.submit(watched=False)
    await bench.executor.run_number(1)
    waiting = await bench.submit(watched=False)
    assert (await refusal(bench.submit())).reason is Reason.QUEUE_FULL
    await bench.engine.cancel(waiting.name)
    assert (await bench.submit(watched=False)).queue_position == 0


async def test_a_full_line_tells_when_the_running_one_will_be_done(another: OpenAnother) -> None:
    """The time after which to try again is what the running generation is expected to need."""
    bench = await another(max_queue=0)
    await bench.succeed(num_inference_steps=100)
    generation = await bench.submit(watched=False, num_inference_steps=100)
    run = await bench.executor.run_number(2)
    run.reach(Stage.DENOISE)
    watcher = bench.watch(generation.name)
    await watcher.saw(Stage.DENOISE, 0)
    bench.engine._pace.learn(Stage.DECODE, generation.video, 4000.0)  # as if a video before had taken that
    run.advance()
    await watcher.saw(Stage.DENOISE, 1)
    retry_s = (await refusal(bench.submit())).retry_after_s
    progress = bench.engine.get(generation.name).progress
    assert progress is not None and progress.eta_s is not None
    assert retry_s == pytest.approx(progress.eta_s, abs=5.0)  # less what has passed since it was told
    assert retry_s is not None and retry_s > 1000.0


async def test_positions_move_up(bench: Bench) -> None:
    """Each that waits hears its place when it comes and whenever it changes, and nothing when it does not."""
    running = await bench.submit(watched=False)
    run = await bench.executor.run_number(1)
    waiting = [await bench.submit(watched=False) for _ in range(3)]
    assert [bench.engine.get(generation.name).queue_position for generation in waiting] == [0, 1, 2]
    await bench.engine.cancel(waiting[1].name)
    assert [bench.engine.get(generation.name).queue_position for generation in waiting] == [0, None, 1]
    run.finish()
    await bench.ended(running.name)
    (await bench.executor.run_number(2)).finish()
    (await bench.executor.run_number(3)).finish()
    await bench.ended(waiting[2].name)
    log = bench.engine._generations[waiting[2].name].records
    assert [record.event.position for record in log if isinstance(record.event, Queued)] == [2, 1, 0]


async def test_waiting_times_are_told_once_work_was_timed(bench: Bench) -> None:
    """Nothing is known before the first video; then each place in line adds what one video takes."""
    await bench.submit(watched=False)
    run = await bench.executor.run_number(1)
    blind = await bench.submit(watched=False)
    first = bench.engine._generations[blind.name].records[-1].event
    assert first == Queued(position=0, eta_s=None)
    for stage, seconds in ((Stage.TEXT, 1.0), (Stage.DENOISE, 30.0), (Stage.DECODE, 9.0)):
        bench.engine._pace.learn(stage, blind.video, seconds)
    run.advance()
    await bench.heard()
    progress = bench.engine.get(run.generation).progress
    third = await bench.submit(watched=False)
    last = bench.engine._generations[third.name].records[-1].event
    assert progress is not None and progress.eta_s is not None
    assert isinstance(last, Queued) and last.position == 1
    assert last.eta_s == pytest.approx(progress.eta_s + 40.0, abs=5.0)  # less what has passed since it was told


async def test_no_start_is_promised_while_the_ranks_are_starting(another: OpenAnother) -> None:
    """The first in line is told no time when there is nobody yet who could begin with it."""
    bench = await another(is_ready=False)
    name = (await bench.submit(watched=False)).name
    assert bench.engine._generations[name].records[-1].event == Queued(position=0, eta_s=None)


async def test_a_request_id_finds_its_generation(bench: Bench) -> None:
    """The same id and body give the same generation, while it waits, while it runs and after its end."""
    first = await bench.submit(request_id=ID)
    assert await bench.submit(request_id=ID, watched=False) == first
    run = await bench.executor.run_number(1)
    again = await bench.submit(request_id=ID)
    assert (again.name, again.state, again.request_id) == (first.name, State.RUNNING, ID)
    run.finish()
    await bench.ended(first.name)
    assert (await bench.submit(request_id=ID)).state is State.SUCCEEDED
    assert len(bench.seen(Admitted)) == 1
    assert len(bench.executor.runs) == 1


async def test_a_request_id_is_found_when_the_line_is_full_or_closed(another: OpenAnother) -> None:
    """Finding what was accepted before needs no room."""
    bench = await another(max_queue=0)
    first = await bench.submit(request_id=ID, watched=False)
    assert (await bench.submit(request_id=ID)).name == first.name
    draining = asyncio.create_task(bench.engine.drain(60.0))
    await asyncio.sleep(0)
    assert (await bench.submit(request_id=ID)).name == first.name
    (await bench.executor.run_number(1)).finish()
    await draining


async def test_a_request_id_belongs_to_one_body(bench: Bench) -> None:
    """Any other value under the same id is refused and changes nothing."""
    first = await bench.submit(request_id=ID)
    sentence = f"request_id {ID} was used before with another body, for {first.name}"
    for change in ({"seed": 2}, {"seed": None}, {"detach_grace_s": 15.0}, {"prompt": "a dog"}):
        failure = await refusal(bench.submit(request_id=ID, **change))
        assert failure == Failure(reason=Reason.REQUEST_ID_REUSED, message=sentence)
    assert bench.seen(Refused) == [Refused(reason=Reason.REQUEST_ID_REUSED)] * 4


async def test_a_request_id_is_free_again_when_its_generation_is_deleted(bench: Bench) -> None:
    """What was deleted is not found by its id: the request makes a new generation."""
    first = await bench.succeed(request_id=ID)
    await bench.engine.delete(first.name)
    second = await bench.submit(request_id=ID, seed=2)
    assert second.name != first.name
    (await bench.executor.run_number(2)).finish()
    await bench.ended(second.name)
