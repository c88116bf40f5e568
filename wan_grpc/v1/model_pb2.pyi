from wan_grpc.v1 import adapter_pb2 as _adapter_pb2
from wan_grpc.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Model(_message.Message):
    __slots__ = ("model_id", "embedded", "tasks", "sizes", "rules", "defaults", "limits", "output_formats", "adapters", "acceleration_profiles", "format_rules")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDED_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMATS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATION_PROFILES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_RULES_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    embedded: bool
    tasks: _containers.RepeatedScalarFieldContainer[_generation_pb2.Task]
    sizes: _containers.RepeatedCompositeFieldContainer[FrameSize]
    rules: ModelRules
    defaults: ModelDefaults
    limits: ModelLimits
    output_formats: _containers.RepeatedScalarFieldContainer[_generation_pb2.OutputFormat]
    adapters: _containers.RepeatedCompositeFieldContainer[_adapter_pb2.Adapter]
    acceleration_profiles: _containers.RepeatedCompositeFieldContainer[AccelerationProfile]
    format_rules: _containers.RepeatedCompositeFieldContainer[FormatRules]
    def __init__(self, model_id: _Optional[str] = ..., embedded: bool = ..., tasks: _Optional[_Iterable[_Union[_generation_pb2.Task, str]]] = ..., sizes: _Optional[_Iterable[_Union[FrameSize, _Mapping]]] = ..., rules: _Optional[_Union[ModelRules, _Mapping]] = ..., defaults: _Optional[_Union[ModelDefaults, _Mapping]] = ..., limits: _Optional[_Union[ModelLimits, _Mapping]] = ..., output_formats: _Optional[_Iterable[_Union[_generation_pb2.OutputFormat, str]]] = ..., adapters: _Optional[_Iterable[_Union[_adapter_pb2.Adapter, _Mapping]]] = ..., acceleration_profiles: _Optional[_Iterable[_Union[AccelerationProfile, _Mapping]]] = ..., format_rules: _Optional[_Iterable[_Union[FormatRules, _Mapping]]] = ...) -> None: ...

class FormatRules(_message.Message):
    __slots__ = ("output_format", "file_suffix", "pixel_formats", "crf", "quality", "is_picture", "max_fps", "max_pixels", "max_side", "min_side")
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    FILE_SUFFIX_FIELD_NUMBER: _ClassVar[int]
    PIXEL_FORMATS_FIELD_NUMBER: _ClassVar[int]
    CRF_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    IS_PICTURE_FIELD_NUMBER: _ClassVar[int]
    MAX_FPS_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_FIELD_NUMBER: _ClassVar[int]
    MIN_SIDE_FIELD_NUMBER: _ClassVar[int]
    output_format: _generation_pb2.OutputFormat
    file_suffix: str
    pixel_formats: _containers.RepeatedScalarFieldContainer[_generation_pb2.PixelFormat]
    crf: IntegerRange
    quality: IntegerRange
    is_picture: bool
    max_fps: int
    max_pixels: int
    max_side: int
    min_side: int
    def __init__(self, output_format: _Optional[_Union[_generation_pb2.OutputFormat, str]] = ..., file_suffix: _Optional[str] = ..., pixel_formats: _Optional[_Iterable[_Union[_generation_pb2.PixelFormat, str]]] = ..., crf: _Optional[_Union[IntegerRange, _Mapping]] = ..., quality: _Optional[_Union[IntegerRange, _Mapping]] = ..., is_picture: bool = ..., max_fps: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_side: _Optional[int] = ..., min_side: _Optional[int] = ...) -> None: ...

class IntegerRange(_message.Message):
    __slots__ = ("min", "max", "default")
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    min: int
    max: int
    default: int
    def __init__(self, min: _Optional[int] = ..., max: _Optional[int] = ..., default: _Optional[int] = ...) -> None: ...

class FrameSize(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class ModelRules(_message.Message):
    __slots__ = ("size_multiple", "num_frames_multiple", "max_text_tokens", "max_side", "takes_image", "needs_image", "takes_last_image", "needs_last_image")
    SIZE_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_FIELD_NUMBER: _ClassVar[int]
    TAKES_IMAGE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_IMAGE_FIELD_NUMBER: _ClassVar[int]
    TAKES_LAST_IMAGE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_LAST_IMAGE_FIELD_NUMBER: _ClassVar[int]
    size_multiple: int
    num_frames_multiple: int
    max_text_tokens: int
    max_side: int
    takes_image: bool
    needs_image: bool
    takes_last_image: bool
    needs_last_image: bool
    def __init__(self, size_multiple: _Optional[int] = ..., num_frames_multiple: _Optional[int] = ..., max_text_tokens: _Optional[int] = ..., max_side: _Optional[int] = ..., takes_image: bool = ..., needs_image: bool = ..., takes_last_image: bool = ..., needs_last_image: bool = ...) -> None: ...

class ModelDefaults(_message.Message):
    __slots__ = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift", "boundary_ratio", "negative_prompt", "output_format")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_2_FIELD_NUMBER: _ClassVar[int]
    FLOW_SHIFT_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_RATIO_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    boundary_ratio: float
    negative_prompt: str
    output_format: _generation_pb2.OutputFormat
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., guidance_scale_2: _Optional[float] = ..., flow_shift: _Optional[float] = ..., boundary_ratio: _Optional[float] = ..., negative_prompt: _Optional[str] = ..., output_format: _Optional[_Union[_generation_pb2.OutputFormat, str]] = ...) -> None: ...

class ModelLimits(_message.Message):
    __slots__ = ("max_area", "max_num_frames", "max_inference_steps", "max_prompt_bytes", "max_image_bytes", "max_queued", "max_image_pixels")
    MAX_AREA_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    max_area: int
    max_num_frames: int
    max_inference_steps: int
    max_prompt_bytes: int
    max_image_bytes: int
    max_queued: int
    max_image_pixels: int
    def __init__(self, max_area: _Optional[int] = ..., max_num_frames: _Optional[int] = ..., max_inference_steps: _Optional[int] = ..., max_prompt_bytes: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_queued: _Optional[int] = ..., max_image_pixels: _Optional[int] = ...) -> None: ...

class AccelerationProfile(_message.Message):
    __slots__ = ("name", "description", "ssim", "psnr_db", "speedup")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SSIM_FIELD_NUMBER: _ClassVar[int]
    PSNR_DB_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    ssim: float
    psnr_db: float
    speedup: float
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., ssim: _Optional[float] = ..., psnr_db: _Optional[float] = ..., speedup: _Optional[float] = ...) -> None: ...

class Topology(_message.Message):
    __slots__ = ("world_size", "copies", "cfg", "ring", "ulysses", "text_tensor", "replicas")
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    CFG_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    ULYSSES_FIELD_NUMBER: _ClassVar[int]
    TEXT_TENSOR_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    world_size: int
    copies: int
    cfg: int
    ring: int
    ulysses: int
    text_tensor: int
    replicas: int
    def __init__(self, world_size: _Optional[int] = ..., copies: _Optional[int] = ..., cfg: _Optional[int] = ..., ring: _Optional[int] = ..., ulysses: _Optional[int] = ..., text_tensor: _Optional[int] = ..., replicas: _Optional[int] = ...) -> None: ...

class Deployment(_message.Message):
    __slots__ = ("ready", "detail", "topology", "device", "dtype", "attention_backend", "load_format", "num_queued", "num_running", "rank_memory")
    READY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    RANK_MEMORY_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    detail: str
    topology: Topology
    device: str
    dtype: str
    attention_backend: str
    load_format: str
    num_queued: int
    num_running: int
    rank_memory: _containers.RepeatedCompositeFieldContainer[_generation_pb2.RankMemory]
    def __init__(self, ready: bool = ..., detail: _Optional[str] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., attention_backend: _Optional[str] = ..., load_format: _Optional[str] = ..., num_queued: _Optional[int] = ..., num_running: _Optional[int] = ..., rank_memory: _Optional[_Iterable[_Union[_generation_pb2.RankMemory, _Mapping]]] = ...) -> None: ...

class UnservedPart(_message.Message):
    __slots__ = ("rpc", "field", "description")
    RPC_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    rpc: str
    field: str
    description: str
    def __init__(self, rpc: _Optional[str] = ..., field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...
