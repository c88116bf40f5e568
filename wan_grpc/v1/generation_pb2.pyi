import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_TEXT_TO_VIDEO: _ClassVar[Task]
    TASK_IMAGE_TO_VIDEO: _ClassVar[Task]
    TASK_TEXT_IMAGE_TO_VIDEO: _ClassVar[Task]

class Expert(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPERT_UNSPECIFIED: _ClassVar[Expert]
    EXPERT_HIGH_NOISE: _ClassVar[Expert]
    EXPERT_LOW_NOISE: _ClassVar[Expert]

class OutputFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_FORMAT_UNSPECIFIED: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_MP4_H264: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_MP4_H264_PROGRESSIVE: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_MP4_H265: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBM_VP9: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBM_AV1: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_MKV_FFV1: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_RAW_RGB24: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBP_ANIMATION: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_GIF: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_PNG: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_JPEG: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBP: _ClassVar[OutputFormat]

class PixelFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIXEL_FORMAT_UNSPECIFIED: _ClassVar[PixelFormat]
    PIXEL_FORMAT_YUV420P: _ClassVar[PixelFormat]
    PIXEL_FORMAT_YUV422P: _ClassVar[PixelFormat]
    PIXEL_FORMAT_YUV444P: _ClassVar[PixelFormat]
    PIXEL_FORMAT_YUV420P10: _ClassVar[PixelFormat]
    PIXEL_FORMAT_YUV444P10: _ClassVar[PixelFormat]
    PIXEL_FORMAT_RGB24: _ClassVar[PixelFormat]

class ImageFit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FIT_UNSPECIFIED: _ClassVar[ImageFit]
    IMAGE_FIT_COVER: _ClassVar[ImageFit]
    IMAGE_FIT_CONTAIN: _ClassVar[ImageFit]
    IMAGE_FIT_STRETCH: _ClassVar[ImageFit]
    IMAGE_FIT_EXACT: _ClassVar[ImageFit]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_TEXT: _ClassVar[Stage]
    STAGE_IMAGE: _ClassVar[Stage]
    STAGE_DENOISE: _ClassVar[Stage]
    STAGE_DECODE: _ClassVar[Stage]
    STAGE_ENCODE: _ClassVar[Stage]

class GenerationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GENERATION_STATE_UNSPECIFIED: _ClassVar[GenerationState]
    GENERATION_STATE_QUEUED: _ClassVar[GenerationState]
    GENERATION_STATE_RUNNING: _ClassVar[GenerationState]
    GENERATION_STATE_SUCCEEDED: _ClassVar[GenerationState]
    GENERATION_STATE_FAILED: _ClassVar[GenerationState]
    GENERATION_STATE_CANCELLED: _ClassVar[GenerationState]
TASK_UNSPECIFIED: Task
TASK_TEXT_TO_VIDEO: Task
TASK_IMAGE_TO_VIDEO: Task
TASK_TEXT_IMAGE_TO_VIDEO: Task
EXPERT_UNSPECIFIED: Expert
EXPERT_HIGH_NOISE: Expert
EXPERT_LOW_NOISE: Expert
OUTPUT_FORMAT_UNSPECIFIED: OutputFormat
OUTPUT_FORMAT_MP4_H264: OutputFormat
OUTPUT_FORMAT_MP4_H264_PROGRESSIVE: OutputFormat
OUTPUT_FORMAT_MP4_H265: OutputFormat
OUTPUT_FORMAT_WEBM_VP9: OutputFormat
OUTPUT_FORMAT_WEBM_AV1: OutputFormat
OUTPUT_FORMAT_MKV_FFV1: OutputFormat
OUTPUT_FORMAT_RAW_RGB24: OutputFormat
OUTPUT_FORMAT_WEBP_ANIMATION: OutputFormat
OUTPUT_FORMAT_GIF: OutputFormat
OUTPUT_FORMAT_PNG: OutputFormat
OUTPUT_FORMAT_JPEG: OutputFormat
OUTPUT_FORMAT_WEBP: OutputFormat
PIXEL_FORMAT_UNSPECIFIED: PixelFormat
PIXEL_FORMAT_YUV420P: PixelFormat
PIXEL_FORMAT_YUV422P: PixelFormat
PIXEL_FORMAT_YUV444P: PixelFormat
PIXEL_FORMAT_YUV420P10: PixelFormat
PIXEL_FORMAT_YUV444P10: PixelFormat
PIXEL_FORMAT_RGB24: PixelFormat
IMAGE_FIT_UNSPECIFIED: ImageFit
IMAGE_FIT_COVER: ImageFit
IMAGE_FIT_CONTAIN: ImageFit
IMAGE_FIT_STRETCH: ImageFit
IMAGE_FIT_EXACT: ImageFit
STAGE_UNSPECIFIED: Stage
STAGE_TEXT: Stage
STAGE_IMAGE: Stage
STAGE_DENOISE: Stage
STAGE_DECODE: Stage
STAGE_ENCODE: Stage
GENERATION_STATE_UNSPECIFIED: GenerationState
GENERATION_STATE_QUEUED: GenerationState
GENERATION_STATE_RUNNING: GenerationState
GENERATION_STATE_SUCCEEDED: GenerationState
GENERATION_STATE_FAILED: GenerationState
GENERATION_STATE_CANCELLED: GenerationState

class AdapterUse(_message.Message):
    __slots__ = ("name", "scale", "expert")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    name: str
    scale: float
    expert: Expert
    def __init__(self, name: _Optional[str] = ..., scale: _Optional[float] = ..., expert: _Optional[_Union[Expert, str]] = ...) -> None: ...

class EncodingOptions(_message.Message):
    __slots__ = ("crf", "bitrate_bps", "quality", "pixel_format")
    CRF_FIELD_NUMBER: _ClassVar[int]
    BITRATE_BPS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PIXEL_FORMAT_FIELD_NUMBER: _ClassVar[int]
    crf: int
    bitrate_bps: int
    quality: int
    pixel_format: PixelFormat
    def __init__(self, crf: _Optional[int] = ..., bitrate_bps: _Optional[int] = ..., quality: _Optional[int] = ..., pixel_format: _Optional[_Union[PixelFormat, str]] = ...) -> None: ...

class GenerationSpec(_message.Message):
    __slots__ = ("prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "fps", "guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio", "seed", "image", "last_image", "image_fit", "output_format", "encoding", "preview_every_steps", "adapters", "acceleration_profile", "max_duration", "detach_grace", "detach_unlimited")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_2_FIELD_NUMBER: _ClassVar[int]
    FLOW_SHIFT_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_RATIO_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATION_PROFILE_FIELD_NUMBER: _ClassVar[int]
    MAX_DURATION_FIELD_NUMBER: _ClassVar[int]
    DETACH_GRACE_FIELD_NUMBER: _ClassVar[int]
    DETACH_UNLIMITED_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    fps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    boundary_ratio: float
    seed: int
    image: bytes
    last_image: bytes
    image_fit: ImageFit
    output_format: OutputFormat
    encoding: EncodingOptions
    preview_every_steps: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterUse]
    acceleration_profile: str
    max_duration: _duration_pb2.Duration
    detach_grace: _duration_pb2.Duration
    detach_unlimited: bool
    def __init__(self, prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., fps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., guidance_scale_2: _Optional[float] = ..., flow_shift: _Optional[float] = ..., boundary_ratio: _Optional[float] = ..., seed: _Optional[int] = ..., image: _Optional[bytes] = ..., last_image: _Optional[bytes] = ..., image_fit: _Optional[_Union[ImageFit, str]] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., encoding: _Optional[_Union[EncodingOptions, _Mapping]] = ..., preview_every_steps: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterUse, _Mapping]]] = ..., acceleration_profile: _Optional[str] = ..., max_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., detach_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., detach_unlimited: bool = ...) -> None: ...

class ResolvedSpec(_message.Message):
    __slots__ = ("prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "fps", "guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio", "seed", "image_sha256", "last_image_sha256", "image_fit", "output_format", "encoding", "preview_every_steps", "adapters", "acceleration_profile", "max_duration", "detach_grace", "detach_unlimited")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_2_FIELD_NUMBER: _ClassVar[int]
    FLOW_SHIFT_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_RATIO_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    LAST_IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATION_PROFILE_FIELD_NUMBER: _ClassVar[int]
    MAX_DURATION_FIELD_NUMBER: _ClassVar[int]
    DETACH_GRACE_FIELD_NUMBER: _ClassVar[int]
    DETACH_UNLIMITED_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    fps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    boundary_ratio: float
    seed: int
    image_sha256: str
    last_image_sha256: str
    image_fit: ImageFit
    output_format: OutputFormat
    encoding: EncodingOptions
    preview_every_steps: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterUse]
    acceleration_profile: str
    max_duration: _duration_pb2.Duration
    detach_grace: _duration_pb2.Duration
    detach_unlimited: bool
    def __init__(self, prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., fps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., guidance_scale_2: _Optional[float] = ..., flow_shift: _Optional[float] = ..., boundary_ratio: _Optional[float] = ..., seed: _Optional[int] = ..., image_sha256: _Optional[str] = ..., last_image_sha256: _Optional[str] = ..., image_fit: _Optional[_Union[ImageFit, str]] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., encoding: _Optional[_Union[EncodingOptions, _Mapping]] = ..., preview_every_steps: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterUse, _Mapping]]] = ..., acceleration_profile: _Optional[str] = ..., max_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., detach_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., detach_unlimited: bool = ...) -> None: ...

class GenerationError(_message.Message):
    __slots__ = ("reason", "code", "message", "retry_delay")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    reason: str
    code: int
    message: str
    retry_delay: _duration_pb2.Duration
    def __init__(self, reason: _Optional[str] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("name", "request_id", "state", "resolved", "warnings", "create_time", "start_time", "end_time", "expire_time", "queue_position", "progress", "completed", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    state: GenerationState
    resolved: ResolvedSpec
    warnings: _containers.RepeatedScalarFieldContainer[str]
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    queue_position: int
    progress: Progress
    completed: Completed
    error: GenerationError
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ..., state: _Optional[_Union[GenerationState, str]] = ..., resolved: _Optional[_Union[ResolvedSpec, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., queue_position: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., completed: _Optional[_Union[Completed, _Mapping]] = ..., error: _Optional[_Union[GenerationError, _Mapping]] = ...) -> None: ...

class GenerationEvent(_message.Message):
    __slots__ = ("sequence", "time", "generation", "accepted", "queued", "progress", "preview", "resumed", "video_info", "chunk", "completed", "heartbeat")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    VIDEO_INFO_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: _timestamp_pb2.Timestamp
    generation: str
    accepted: Accepted
    queued: Queued
    progress: Progress
    preview: Preview
    resumed: Resumed
    video_info: VideoInfo
    chunk: Chunk
    completed: Completed
    heartbeat: Heartbeat
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., generation: _Optional[str] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., video_info: _Optional[_Union[VideoInfo, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., completed: _Optional[_Union[Completed, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("resolved", "warnings")
    RESOLVED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    resolved: ResolvedSpec
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, resolved: _Optional[_Union[ResolvedSpec, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position", "eta")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    position: int
    eta: _duration_pb2.Duration
    def __init__(self, position: _Optional[int] = ..., eta: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "step", "total_steps", "expert", "step_time", "eta", "slowest_rank", "slowest_rank_time")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_RANK_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_RANK_TIME_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    step: int
    total_steps: int
    expert: Expert
    step_time: _duration_pb2.Duration
    eta: _duration_pb2.Duration
    slowest_rank: int
    slowest_rank_time: _duration_pb2.Duration
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., expert: _Optional[_Union[Expert, str]] = ..., step_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., eta: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., slowest_rank: _Optional[int] = ..., slowest_rank_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("step", "media_type", "data")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    step: int
    media_type: str
    data: bytes
    def __init__(self, step: _Optional[int] = ..., media_type: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("step", "total_steps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    total_steps: int
    def __init__(self, step: _Optional[int] = ..., total_steps: _Optional[int] = ...) -> None: ...

class VideoInfo(_message.Message):
    __slots__ = ("output_format", "media_type", "width", "height", "num_frames", "fps")
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    output_format: OutputFormat
    media_type: str
    width: int
    height: int
    num_frames: int
    fps: int
    def __init__(self, output_format: _Optional[_Union[OutputFormat, str]] = ..., media_type: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data", "crc32c")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32c: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class Completed(_message.Message):
    __slots__ = ("size_bytes", "sha256", "stage_times", "rank_memory")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    STAGE_TIMES_FIELD_NUMBER: _ClassVar[int]
    RANK_MEMORY_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    sha256: str
    stage_times: _containers.RepeatedCompositeFieldContainer[StageTime]
    rank_memory: _containers.RepeatedCompositeFieldContainer[RankMemory]
    def __init__(self, size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., stage_times: _Optional[_Iterable[_Union[StageTime, _Mapping]]] = ..., rank_memory: _Optional[_Iterable[_Union[RankMemory, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("stage", "duration")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    duration: _duration_pb2.Duration
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RankMemory(_message.Message):
    __slots__ = ("rank", "peak_bytes")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    peak_bytes: int
    def __init__(self, rank: _Optional[int] = ..., peak_bytes: _Optional[int] = ...) -> None: ...
