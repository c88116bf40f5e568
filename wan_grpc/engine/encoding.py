"""From raw frames to the bytes of a finished video, on a thread of its own, while the ranks do something else.

Knows the encoder and the two files. Does not know the loop, the ranks or who watches.
"""

from collections.abc import Callable
from pathlib import Path

from wan_grpc.domain.errors import Failure, Reason, ServiceError
from wan_grpc.domain.request import VideoRequest
from wan_grpc.media.video import ScratchError, open_encoder
from wan_grpc.store.artifacts import Artifact, StorageFailedError
from wan_grpc.store.frames import FramesAbortedError, FrameSpool


class Encoding:
    """Frames in on one thread, video bytes out on another."""

    def __init__(self, video: VideoRequest, artifact: Artifact, directory: Path) -> None:
        self._video = video
        self._artifact = artifact
        self._directory = directory
        self._frames = FrameSpool(directory, video.frame_bytes)
        self.num_encoded = 0
        self.put_failure: Failure | None = None

    def take_frame(self, frame: memoryview) -> None:
        """Keep one frame for the encoder. Never raises and never waits for the encoder: a rank stands behind it."""
        try:
            self._frames.put(frame)
        except FramesAbortedError:
            pass  # cancelled: what the ranks still deliver is dropped
        except StorageFailedError as error:
            self.put_failure = storage_failure(error)
            self._frames.abort()

    def end_of_frames(self) -> None:
        self._frames.close()

    def abort(self) -> None:
        """Stop at the next frame and free the disk. Does nothing when all is done."""
        self._frames.abort()

    def encode(self, on_bytes: Callable[[], None]) -> None:
        """Encode until the last frame; `on_bytes` is called whenever the artifact has grown.

        Raises:
            FramesAbortedError: after `abort`.
            ServiceError: STORAGE_FAILED, when the disk refused bytes.
        """

        def write(data: bytes) -> None:
            self._artifact.append(data)
            on_bytes()

        try:
            self._encode(write)
        except (StorageFailedError, ScratchError) as error:
            failure = storage_failure(error)
            raise ServiceError(failure.reason, failure.message) from error
        finally:
            self._frames.abort()

    def _encode(self, write: Callable[[bytes], None]) -> None:
        encoder = open_encoder(self._video, write, scratch=self._directory)
        try:
            for frame in self._frames.frames():
                encoder.add(frame)
                self.num_encoded += 1
            encoder.finish()
        finally:
            encoder.abort()


def storage_failure(error: OSError) -> Failure:
    return Failure(reason=Reason.STORAGE_FAILED, message=f"the server could not store the video: {error.strerror}")
