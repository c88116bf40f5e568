"""Words for people: events on the bar, what came out of a generation, and what went wrong, line by line."""

import time
from collections.abc import Callable, Iterator

from wan_grpc_client.bar import Bar
from wan_grpc_client.errors import WanGrpcError
from wan_grpc_client.events import Accepted, Event, GenerationStatus, Progress, Queued, Reattaching, Resumed
from wan_grpc_client.following import Video


def show_event(bar: Bar, event: Event) -> None:
    """Bring what the event tells to the bar."""
    match event:
        case Accepted():
            for warning in event.warnings:
                bar.say(f"warning: {warning}")
        case Queued():
            start = "" if event.eta_s is None else f", starts in about {event.eta_s:.0f} s"
            place = f"{event.position} before this one" if event.position else "next in line"
            bar.wait(f"queued, {place}{start}")
        case Progress():
            bar.show(
                stage=event.stage,
                step=event.step,
                total_steps=event.total_steps,
                expert=event.expert,
                step_time_s=event.step_time_s,
                eta_s=event.eta_s,
            )
        case Resumed():
            bar.say(f"interrupted; taken up again at step {event.step} of {event.total_steps}")
        case Reattaching():
            bar.say(f"the connection was cut ({event.message}); attaching again")


def video_lines(video: Video) -> Iterator[str]:
    """Where the video is and what it is."""
    info = video.info
    place = f"{video.path}: " if video.path else ""
    size = picture_words(info.width, info.height, info.num_frames, info.fps)
    yield f"{place}{size}, {video.size_bytes} bytes, seed {video.resolved.seed}"
    yield f"sha256 {video.sha256}"


def picture_words(width: int, height: int, num_frames: int, fps: int) -> str:
    """How large and how long a video is."""
    return f"{width}x{height}, " + ("1 frame" if num_frames == 1 else f"{num_frames} frames at {fps} fps")


def error_lines(error: WanGrpcError, *, field_name: Callable[[str], str] = str) -> Iterator[str]:
    """The server's sentence, then each violation on a line of its own, then what to do."""
    reason = f" ({error.reason})" if error.reason else f" ({error.code.name})"
    yield ("the request was refused" if error.violations else error.message) + reason
    for violation in error.violations:
        yield f"  {field_name(violation.field)}: {violation.description}"
    if error.retry_after_s is not None:
        yield f"  try again in {error.retry_after_s:g} s"
    if error.server_request_id and error.reason == "INTERNAL":
        yield f"  the server's log has it under request id {error.server_request_id}"


def status_lines(status: GenerationStatus) -> Iterator[str]:
    """A generation, one fact a line."""
    resolved = status.resolved
    yield f"{status.name} {status.state}{_situation(status)}"
    yield f"  prompt: {resolved.prompt}"
    size = picture_words(resolved.width, resolved.height, resolved.num_frames, resolved.fps)
    yield f"  video: {size}, {resolved.num_inference_steps} steps, {resolved.output_format}, seed {resolved.seed}"
    yield f"  accepted: {_local_time(status.create_time_s)}"
    if status.end_time_s is not None:
        yield f"  ended: {_local_time(status.end_time_s)}"
    if status.completed is not None:
        yield f"  bytes: {status.completed.size_bytes}"
        yield f"  sha256: {status.completed.sha256}"
    if status.error is not None:
        yield f"  error: {status.error.message} ({status.error.reason})"
    for warning in status.warnings:
        yield f"  warning: {warning}"


def status_row(status: GenerationStatus) -> str:
    """A generation on one line."""
    return f"{status.name}  {_local_time(status.create_time_s)}  {status.state}{_situation(status)}"


def _situation(status: GenerationStatus) -> str:
    if status.queue_position is not None:
        return f", {status.queue_position} before it"
    if status.state == "running" and status.progress is not None:
        return f", {status.progress.stage} {status.progress.step}/{status.progress.total_steps}"
    return ""


def _local_time(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
