"""The bytes of a video: the same for the same request, right, and playable before they are all there."""

import hashlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import pytest
from PIL import Image, ImageSequence

from tests.functional.live import OK, LiveServer, kind, running_server, spec, stage
from wan_grpc.v1 import generation_pb2 as pb

VIDEO = spec(width=96, height=80, num_frames=33, num_inference_steps=3, fps=16)
LARGER = spec(width=320, height=256, num_frames=33, num_inference_steps=1, fps=16)


def bound_to(cores: Sequence[int]) -> list[str]:
    """The command that serves on these cores alone."""
    script = (
        f"import os, sys; os.sched_setaffinity(0, {sorted(cores)}); "
        "os.execv(sys.executable, [sys.executable, '-m', 'wan_grpc.cli', 'serve', *sys.argv[1:]])"
    )
    return [sys.executable, "-c", script]


def decode(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


PICTURES = {pb.OUTPUT_FORMAT_PNG, pb.OUTPUT_FORMAT_JPEG, pb.OUTPUT_FORMAT_WEBP}
MEDIA_TYPES = {
    pb.OUTPUT_FORMAT_MP4_H264: "video/mp4",
    pb.OUTPUT_FORMAT_MP4_H264_PROGRESSIVE: "video/mp4",
    pb.OUTPUT_FORMAT_MP4_H265: "video/mp4",
    pb.OUTPUT_FORMAT_WEBM_VP9: "video/webm",
    pb.OUTPUT_FORMAT_WEBM_AV1: "video/webm",
    pb.OUTPUT_FORMAT_MKV_FFV1: "video/matroska",
    pb.OUTPUT_FORMAT_RAW_RGB24: "application/octet-stream",
    pb.OUTPUT_FORMAT_WEBP_ANIMATION: "image/webp",
    pb.OUTPUT_FORMAT_GIF: "image/gif",
    pb.OUTPUT_FORMAT_PNG: "image/png",
    pb.OUTPUT_FORMAT_JPEG: "image/jpeg",
    pb.OUTPUT_FORMAT_WEBP: "image/webp",
}


def of_format(output_format: int) -> pb.GenerationSpec:
    """A short video, or a single frame where the format is a picture."""
    num_frames = 1 if output_format in PICTURES else 5
    return spec(width=96, height=80, num_frames=num_frames, num_inference_steps=1, output_format=output_format)


def frame_sizes(output_format: int, data: bytes) -> list[tuple[int, int]]:
    """What a reader of the format finds."""
    if output_format == pb.OUTPUT_FORMAT_RAW_RGB24:
        return [(96, 80)] * (len(data) // (96 * 80 * 3))
    if output_format == pb.OUTPUT_FORMAT_WEBP_ANIMATION:  # which FFmpeg does not read
        with Image.open(io.BytesIO(data)) as image:
            return [frame.size for frame in ImageSequence.Iterator(image)]
    return [(frame.width, frame.height) for frame in decode(data)]


@pytest.mark.parametrize("output_format", MEDIA_TYPES, ids=pb.OutputFormat.Name)
def test_every_format_is_what_video_info_says(live: LiveServer, output_format: int) -> None:
    """Through the whole service, each format has its media type, and the frames of the size that was asked for."""
    stream = live.make(of_format(output_format))
    info = next(event.video_info for event in stream.events if event.HasField("video_info"))
    assert frame_sizes(output_format, bytes(stream.video)) == [(96, 80)] * info.num_frames
    assert info.media_type.split(";")[0] == MEDIA_TYPES[output_format]
    assert info.num_frames == of_format(output_format).num_frames


@pytest.mark.parametrize("output_format", MEDIA_TYPES, ids=pb.OutputFormat.Name)
def test_same_request_same_bytes(live: LiveServer, output_format: int) -> None:
    """A request that is repeated gives the very same bytes; with another seed it does not."""
    video = of_format(output_format)
    first, second = live.make(video), live.make(video)
    assert first.video == second.video
    video.seed += 1
    assert live.make(video).video != first.video


def test_same_bytes_from_another_server(live: LiveServer, checkpoint_dir: Path, tmp_path: Path) -> None:
    """Neither the number of threads nor the cores they run on change a byte."""
    core = min(os.sched_getaffinity(0))
    flags = ("--model-path", str(checkpoint_dir), "--drain-window-s", "0", "--cpu-threads", "4")
    with running_server(tmp_path, *flags, program=bound_to([core])) as other:
        (rank,) = other.ranks()
        assert (rank.cpu_affinity(), other.make(VIDEO).video == live.make(VIDEO).video) == ([core], True)


def test_completed_tells_what_was_received(live: LiveServer) -> None:
    """Size and SHA-256 in `completed`, and what GetGeneration repeats of them, are those of the bytes received."""
    stream = live.make(VIDEO)
    told = (len(stream.video), hashlib.sha256(stream.video).hexdigest())
    kept = live.get(stream.name).completed
    assert (stream.completed.size_bytes, stream.completed.sha256) == told
    assert kept == stream.completed


def test_video_is_what_was_asked_for(live: LiveServer) -> None:
    """A decoder finds the size, the number and the rate of frames that the request and `video_info` say."""
    stream = live.make(VIDEO)
    info = next(event.video_info for event in stream.events if event.HasField("video_info"))
    with av.open(io.BytesIO(stream.video)) as container:
        video = container.streams.video[0]
        found = (video.width, video.height, sum(1 for _ in container.decode(video)), video.average_rate)
    assert found == (96, 80, 33, 16) == (info.width, info.height, info.num_frames, info.fps)


def test_half_a_video_plays(live: LiveServer) -> None:
    """What was received when half was decoded opens as a video, and its frames are those of the whole."""
    stream = live.generate(LARGER)
    half = stream.until(stage(pb.STAGE_DECODE, step=5)).progress
    prefix = bytes(stream.video)
    assert (stream.finish(), half.total_steps) == (OK, 9)
    early, whole = decode(prefix), decode(stream.video)
    assert 8 <= len(early) < len(whole) == LARGER.num_frames
    assert [frame.to_ndarray().tobytes() for frame in early] == [
        frame.to_ndarray().tobytes() for frame in whole[: len(early)]
    ]


def test_first_chunk_comes_while_frames_are_decoded(live: LiveServer) -> None:
    """The first chunk, which a player can show, precedes the end of decoding on the stream."""
    stream = live.generate(LARGER)
    first = stream.until(kind("chunk"))
    assert decode(first.chunk.data)
    last_decoded = stream.until(stage(pb.STAGE_DECODE, step=9))
    assert (last_decoded.sequence > first.sequence, stream.finish()) == (True, OK)
    assert stream.kinds()[0] == "accepted"
    assert stream.kinds().index("video_info") < stream.kinds().index("chunk")
    assert stream.stages() == [pb.STAGE_TEXT, pb.STAGE_DENOISE, pb.STAGE_DECODE, pb.STAGE_ENCODE]
