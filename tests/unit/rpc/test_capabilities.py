import json
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from tests.fakes import CARD
from wan_grpc import __version__
from wan_grpc.domain.events import RankMemory
from wan_grpc.domain.formats import FORMATS, OutputFormat
from wan_grpc.domain.status import EngineStatus
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import I2V_A14B, TI2V_5B, TI2V_5B_SIZES, Limits, ModelCard, Task
from wan_grpc.rpc.capabilities import describe
from wan_grpc.rpc.unserved import UNSERVED_FIELDS

STATUS = EngineStatus(
    ready=True,
    detail="ready",
    topology=Topology(cfg=2, ring=3, ulysses=4, text_tensor=6),
    num_replicas=5,
    device="cpu",
    dtype="float32",
    attention="sdpa",
    load_format="safetensors",
    queue_limit=16,
    num_queued=3,
    num_running=1,
    rank_memory=(RankMemory(rank=1, peak_bytes=6),),
)
DEPLOYMENT = {
    "ready": True,
    "detail": "ready",
    "topology": {
        "world_size": 24,
        "copies": 1,
        "cfg": 2,
        "ring": 3,
        "ulysses": 4,
        "text_tensor": 6,
        "replicas": 5,
    },
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "sdpa",
    "load_format": "safetensors",
    "num_queued": 3,
    "num_running": 1,
    "rank_memory": [{"rank": 1, "peak_bytes": "6"}],
}
FOUR_SIZES = [
    {"width": 1280, "height": 720},
    {"width": 720, "height": 1280},
    {"width": 832, "height": 480},
    {"width": 480, "height": 832},
]
LIMITS = {
    "max_area": 921600,
    "max_num_frames": 161,
    "max_inference_steps": 100,
    "max_prompt_bytes": 16384,
    "max_queued": 16,
}
CRF_51 = {"max": 51, "default": 18}
QUALITY = {"min": 1, "max": 100, "default": 90}
YUV8 = ["PIXEL_FORMAT_YUV420P", "PIXEL_FORMAT_YUV422P", "PIXEL_FORMAT_YUV444P"]
YUV = [*YUV8, "PIXEL_FORMAT_YUV420P10", "PIXEL_FORMAT_YUV444P10"]
RGB = ["PIXEL_FORMAT_RGB24"]


def rules(name: str, file_suffix: str, pixel_formats: list[str], **more: Any) -> dict[str, Any]:
    always = {"output_format": f"OUTPUT_FORMAT_{name}", "file_suffix": file_suffix, "pixel_formats": pixel_formats}
    return {"max_side": 16384, "min_side": 1, **always, **more}


FORMAT_RULES = [
    rules("MP4_H264", ".mp4", YUV, crf=CRF_51),
    rules("MP4_H264_PROGRESSIVE", ".mp4", YUV, crf=CRF_51),
    rules("MP4_H265", ".mp4", YUV, crf={"max": 51, "default": 22}, max_side=8192, min_side=32),
    rules("WEBM_VP9", ".webm", YUV8, crf={"max": 63, "default": 24}),
    rules("WEBM_AV1", ".webm", [YUV[0], YUV[3]], crf={"min": 1, "max": 63, "default": 28}, max_side=8192, min_side=64),
    rules("MKV_FFV1", ".mkv", RGB),
    rules("RAW_RGB24", ".rgb", RGB),
    rules("WEBP_ANIMATION", ".webp", YUV[:1], quality=QUALITY, max_pixels="50000000", max_side=16383),
    rules("GIF", ".gif", RGB, max_fps=50, max_pixels="50000000"),
    rules("PNG", ".png", RGB, is_picture=True),
    rules("JPEG", ".jpg", YUV8, quality=QUALITY, is_picture=True),
    rules("WEBP", ".webp", YUV[:1], quality=QUALITY, is_picture=True, max_side=16383),
]
T2V_MODEL = {
    "model_id": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "tasks": ["TASK_TEXT_TO_VIDEO"],
    "sizes": FOUR_SIZES,
    "rules": {"size_multiple": 16, "num_frames_multiple": 4, "max_text_tokens": 512, "max_side": 16384},
    "defaults": {
        "width": 1280,
        "height": 720,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "flow_shift": 12.0,
        "boundary_ratio": 0.875,
        "output_format": "OUTPUT_FORMAT_MP4_H264",
    },
    "limits": LIMITS,
    "output_formats": [one["output_format"] for one in FORMAT_RULES],
    "format_rules": FORMAT_RULES,
}
I2V_MODEL = {
    **T2V_MODEL,
    "model_id": "i2v",
    "tasks": ["TASK_IMAGE_TO_VIDEO"],
    "rules": {
        "size_multiple": 16,
        "num_frames_multiple": 4,
        "max_text_tokens": 512,
        "max_side": 8192,
        "takes_image": True,
        "needs_image": True,
        "takes_last_image": True,
        "needs_last_image": True,
    },
    "defaults": {
        **T2V_MODEL["defaults"],  # type: ignore[dict-item]
        "guidance_scale": 3.5,
        "guidance_scale_2": 3.5,
        "flow_shift": 5.0,
        "boundary_ratio": 0.9,
        "negative_prompt": "blurry",
    },
    "limits": {**LIMITS, "max_image_bytes": "1000", "max_image_pixels": "2000"},
}
TI2V_MODEL = {
    "model_id": "wan-tiny-t2v",
    "embedded": True,
    "tasks": ["TASK_TEXT_IMAGE_TO_VIDEO"],
    "sizes": [{"width": 1280, "height": 704}, {"width": 704, "height": 1280}],
    "rules": {
        "size_multiple": 32,
        "num_frames_multiple": 4,
        "max_text_tokens": 512,
        "max_side": 16384,
        "takes_image": True,
    },
    "defaults": {
        "width": 1280,
        "height": 704,
        "num_frames": 121,
        "fps": 24,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "guidance_scale_2": 5.0,
        "flow_shift": 5.0,
        "output_format": "OUTPUT_FORMAT_MP4_H264",
    },
    "limits": {**LIMITS, "max_image_bytes": "8388608", "max_image_pixels": "33554432"},
    "output_formats": ["OUTPUT_FORMAT_MP4_H264", "OUTPUT_FORMAT_GIF"],
    "format_rules": [FORMAT_RULES[0], FORMAT_RULES[8]],
}
I2V_CARD = replace(
    CARD,
    model_id="i2v",
    task=Task.IMAGE_TO_VIDEO,
    defaults=replace(I2V_A14B, negative_prompt="blurry"),
    limits=Limits(
        max_area=1280 * 720,
        max_num_frames=161,
        max_inference_steps=100,
        max_image_bytes=1000,
        max_image_pixels=2000,
    ),
    max_side=8192,
    takes_last_image=True,
    needs_last_image=True,
)
TI2V_CARD = replace(
    CARD,
    model_id="wan-tiny-t2v",
    embedded=True,
    task=Task.TEXT_IMAGE_TO_VIDEO,
    defaults=TI2V_5B,
    size_multiple=32,
    sizes=TI2V_5B_SIZES,
    formats=(OutputFormat.MP4_H264, OutputFormat.GIF),
)


@pytest.mark.parametrize(
    ("card", "model"), [(CARD, T2V_MODEL), (I2V_CARD, I2V_MODEL), (TI2V_CARD, TI2V_MODEL)], ids=["t2v", "i2v", "ti2v"]
)
def test_the_model_on_the_wire(card: ModelCard, model: dict[str, Any]) -> None:
    """GetModel tells what the model takes and allows, how it is run, and every part of the API that is missing."""
    told = MessageToDict(describe(card, STATUS), preserving_proto_field_name=True)
    unserved = told.pop("unserved")
    assert told == {"model": model, "deployment": DEPLOYMENT, "server_version": __version__}
    assert all(part.pop("description") for part in unserved)
    assert json.dumps(unserved) == json.dumps(
        [{"rpc": f"wan_grpc.v1.AdapterService/{m}"} for m in ("LoadAdapter", "UnloadAdapter", "ListAdapters")]
        + [{"field": field} for field in UNSERVED_FIELDS]
    )


def test_every_format_is_expected() -> None:
    """The tables above leave no format out."""
    assert [one["output_format"] for one in FORMAT_RULES] == [f"OUTPUT_FORMAT_{name.name}" for name in FORMATS]
