"""The published Wan2.2 models as facts: tasks, sizes, defaults. A checkpoint's own files win over them."""

from dataclasses import dataclass, field
from enum import StrEnum

from wan_grpc.domain.formats import MAX_SIDE, OutputFormat


class Task(StrEnum):
    TEXT_TO_VIDEO = "t2v"
    IMAGE_TO_VIDEO = "i2v"
    TEXT_IMAGE_TO_VIDEO = "ti2v"


class Expert(StrEnum):
    """Which of the two transformers of an A14B model ran a step; one-expert models only know HIGH_NOISE."""

    HIGH_NOISE = "high_noise"
    LOW_NOISE = "low_noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request means where it says nothing."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    boundary_ratio: float | None
    negative_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Largest values that a server accepts; options of the server, visible in GetModel."""

    max_area: int = 1280 * 720
    """Pixels of one frame."""
    max_num_frames: int = 161
    max_inference_steps: int = 200
    max_prompt_bytes: int = 16384
    max_image_bytes: int = 8 * 1024 * 1024
    """Of one input image, as a file."""
    max_image_pixels: int = 2**25
    """Of one input image: what decoding it may cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What one loaded model can do: the answer of GetModel, and what requests are checked against."""

    model_id: str
    """As the operator named it: a directory, a hub id, or the name of an embedded model."""
    task: Task
    defaults: Defaults
    limits: Limits
    size_multiple: int
    """Width and height are multiples of this many pixels (spatial VAE factor x patch)."""
    max_side: int = MAX_SIDE
    """Most pixels of a side, however few the other one has: positions that the model knows, and the encoder's bound."""
    temporal_factor: int = 4
    """num_frames is 1 more than a multiple of this."""
    max_text_tokens: int = 512
    embedded: bool = False
    """True for a small model that comes with the package and knows coloured shapes in motion alone."""
    words: frozenset[str] = frozenset()
    """All that it was trained on, in lower case, if those are so few that others are worth a warning; else empty."""
    sizes: tuple[tuple[int, int], ...] = field(default=())
    """Recommended (width, height) pairs; others that fit the rules work too."""
    formats: tuple[OutputFormat, ...] = tuple(OutputFormat)
    takes_last_image: bool = False
    """Whether a video may be made from its first to its last image."""
    needs_last_image: bool = False
    """Whether it cannot be made otherwise."""

    @property
    def takes_image(self) -> bool:
        return self.task is not Task.TEXT_TO_VIDEO

    @property
    def needs_image(self) -> bool:
        return self.task is Task.IMAGE_TO_VIDEO

    @property
    def has_two_experts(self) -> bool:
        return self.defaults.boundary_ratio is not None


T2V_A14B = Defaults(
    width=1280,
    height=720,
    num_frames=81,
    fps=16,
    num_inference_steps=40,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    flow_shift=12.0,
    boundary_ratio=0.875,
)
T2V_A14B_SIZES = ((1280, 720), (720, 1280), (832, 480), (480, 832))
I2V_A14B = Defaults(
    width=1280,
    height=720,
    num_frames=81,
    fps=16,
    num_inference_steps=40,
    guidance_scale=3.5,
    guidance_scale_2=3.5,
    flow_shift=5.0,
    boundary_ratio=0.9,
)
I2V_A14B_SIZES = T2V_A14B_SIZES
TI2V_5B = Defaults(
    width=1280,
    height=704,
    num_frames=121,
    fps=24,
    num_inference_steps=50,
    guidance_scale=5.0,
    guidance_scale_2=5.0,
    flow_shift=5.0,
    boundary_ratio=None,
)
TI2V_5B_SIZES = ((1280, 704), (704, 1280))
