import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_ranks import CARD, ask
from wan_grpc.domain.errors import Failure, Reason
from wan_grpc.domain.events import Progress, Stage
from wan_grpc.domain.formats import OutputFormat
from wan_grpc.domain.request import MAX_SEED, VideoRequest, resolve
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Expert
from wan_grpc.engine import messages
from wan_grpc.engine.messages import (
    Cancel,
    FrameReady,
    LoadFailed,
    MemoryUse,
    PreviewMade,
    RankConfig,
    Ready,
    Run,
    RunEnded,
    SlotFreed,
    StepDone,
    Stop,
)
from wan_grpc.pipeline.checkpoint import Checkpoint

VIDEO = resolve(ask(), CARD, fallback_seed=0)
ORDERS = [Run(generation="generations/1", video=VIDEO), Stop()]
TO_RANK = [*ORDERS, Cancel(generation="generations/1"), SlotFreed(slot=7)]
FROM_RANK = [
    Ready(rank=1, device="cpu (1 threads)", dtype="float32", attention="torch_sdpa", used_bytes=2**40, links_s=1.5),
    LoadFailed(rank=0, message="transformer/ lacks 3 tensors"),
    StepDone(progress=Progress(stage=Stage.TEXT, step=0, total_steps=2)),
    StepDone(
        progress=Progress(
            stage=Stage.DENOISE, step=3, total_steps=40, expert=Expert.LOW_NOISE, step_time_s=1.5, eta_s=9.0
        )
    ),
    PreviewMade(step=3, width=2, height=1, rgb=b"\0\xff\0\1\2\3", time_s=0.5),
    FrameReady(slot=0),
    RunEnded(generation="generations/1", memory=(MemoryUse(used_bytes=1, peak_bytes=2),)),
    RunEnded(generation="generations/1", memory=(), cancelled=True),
    RunEnded(
        generation="generations/1",
        memory=(),
        failure=Failure(reason=Reason.OUT_OF_MEMORY, message="too large", retry_after_s=1.0),
    ),
]
CONFIG = RankConfig(
    rank=1,
    topology=Topology(cfg=2, ring=3, ulysses=4, text_tensor=2, num_heads=40),
    rendezvous="/tmp/meet",
    local_rank=25,
    first_rank=24,
    demand="--num-gpus 48 needs 48 GPUs",
    checkpoint=Checkpoint(model_path="org/model", directory=None),
    device="cuda:1",
    dtype="bfloat16",
    load_format="dummy",
    cpu_threads=4,
    slot_bytes=1280 * 720 * 3,
    num_slots=8,
    log_format="json",
    log_level="info",
)


def names(values: list[object]) -> list[str]:
    return [type(value).__name__ for value in values]


@pytest.mark.parametrize("message", TO_RANK, ids=names(TO_RANK))
def test_messages_to_a_rank_arrive_as_they_were_sent(message: messages.ToRank) -> None:
    """Type and every value survive the trip to a rank."""
    assert messages.decode_to_rank(messages.encode(message)) == message


@pytest.mark.parametrize("message", ORDERS, ids=names(ORDERS))
def test_orders_arrive_at_every_rank(message: messages.Order) -> None:
    """Type and every value survive the trip from rank 0 to the others."""
    assert messages.decode_order(messages.encode(message)) == message


@pytest.mark.parametrize("message", FROM_RANK, ids=names(FROM_RANK))
def test_messages_from_a_rank_arrive_as_they_were_sent(message: messages.FromRank) -> None:
    """Type and every value survive the trip to the server."""
    assert messages.decode_from_rank(messages.encode(message)) == message


@pytest.mark.parametrize("directory", [None, "/models/wan"])
def test_the_config_of_a_rank_arrives_as_it_was_made(directory: str | None) -> None:
    """All that a rank is told at birth survives, topology and checkpoint as the values that they are."""
    config = msgspec.structs.replace(CONFIG, checkpoint=Checkpoint(model_path="a", directory=directory))
    assert messages.decode_config(messages.encode(config)) == config


@given(
    st.builds(
        VideoRequest,
        prompt=st.text(),
        negative_prompt=st.text(),
        width=st.integers(16, 2**16),
        height=st.integers(16, 2**16),
        num_frames=st.integers(1, 161),
        fps=st.integers(1, 120),
        num_inference_steps=st.integers(1, 200),
        guidance_scale=st.floats(0.0, 100.0),
        guidance_scale_2=st.floats(0.0, 100.0),
        flow_shift=st.floats(0.0, 100.0),
        boundary_ratio=st.none() | st.floats(0.0, 1.0),
        seed=st.integers(0, MAX_SEED),
        output_format=st.sampled_from(OutputFormat),
    )
)
def test_any_video_arrives_as_it_was_asked_for(video: VideoRequest) -> None:
    """No text, size, seed or fraction is changed by the codec; two requests that differ stay different."""
    run = Run(generation="generations/1", video=video)
    assert messages.decode_order(messages.encode(run)) == run


@pytest.mark.parametrize("message", FROM_RANK, ids=names(FROM_RANK))
def test_a_rank_refuses_what_only_a_rank_says(message: messages.FromRank) -> None:
    """A message that runs the other way is an error, not a guess."""
    with pytest.raises(msgspec.ValidationError, match="Invalid value"):
        messages.decode_to_rank(messages.encode(message))


@pytest.mark.parametrize("message", TO_RANK, ids=names(TO_RANK))
def test_the_server_refuses_what_only_it_says(message: messages.ToRank) -> None:
    """The same in the other direction."""
    with pytest.raises(msgspec.ValidationError, match="Invalid value"):
        messages.decode_from_rank(messages.encode(message))


@pytest.mark.parametrize("message", TO_RANK[2:], ids=names(TO_RANK[2:]))
def test_only_orders_are_shared_between_ranks(message: messages.ToRank) -> None:
    """What is for rank 0 alone is never taken as an order of all."""
    with pytest.raises(msgspec.ValidationError, match="Invalid value"):
        messages.decode_order(messages.encode(message))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"not msgpack",
        msgspec.msgpack.encode({"type": "Reboot"}),
        msgspec.msgpack.encode({"type": "Cancel"}),
        msgspec.msgpack.encode({"type": "SlotFreed", "slot": "1"}),
        msgspec.msgpack.encode(["Stop"]),
        messages.encode(ORDERS[0])[:-1],
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    """Unknown tags, missing and mistyped values, and cut or foreign bytes raise; none becomes a message."""
    for decode in (messages.decode_to_rank, messages.decode_order, messages.decode_from_rank, messages.decode_config):
        with pytest.raises(msgspec.DecodeError):
            decode(data)
