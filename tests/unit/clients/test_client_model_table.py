from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from wan_grpc.v1 import video_generation_service_pb2 as service_pb
from wan_grpc_client.model_table import model_lines

FORMATS = [
    {
        "outputFormat": "OUTPUT_FORMAT_MP4_H264",
        "fileSuffix": ".mp4",
        "pixelFormats": ["PIXEL_FORMAT_YUV420P", "PIXEL_FORMAT_YUV444P10"],
        "crf": {"min": 0, "max": 51, "default": 18},
        "maxSide": 16384,
        "minSide": 1,
    },
    {
        "outputFormat": "OUTPUT_FORMAT_WEBP",
        "fileSuffix": ".webp",
        "pixelFormats": ["PIXEL_FORMAT_YUV420P"],
        "quality": {"min": 1, "max": 100, "default": 90},
        "isPicture": True,
        "maxFps": 50,
        "maxPixels": 50000000,
        "maxSide": 8192,
        "minSide": 64,
    },
]
ANSWER: dict[str, Any] = {
    "model": {
        "modelId": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "tasks": ["TASK_IMAGE_TO_VIDEO"],
        "sizes": [{"width": 1280, "height": 720}, {"width": 720, "height": 1280}],
        "rules": {
            "sizeMultiple": 16,
            "numFramesMultiple": 4,
            "maxTextTokens": 512,
            "maxSide": 16384,
            "takesImage": True,
            "needsImage": True,
            "takesLastImage": True,
        },
        "defaults": {
            "width": 1280,
            "height": 720,
            "numFrames": 81,
            "fps": 16,
            "numInferenceSteps": 40,
            "guidanceScale": 3.5,
            "guidanceScale2": 3.0,
            "flowShift": 5.0,
            "boundaryRatio": 0.9,
            "negativePrompt": "blurred, overexposed, " * 6,
            "outputFormat": "OUTPUT_FORMAT_MP4_H264",
        },
        "limits": {
            "maxArea": 921600,
            "maxNumFrames": 161,
            "maxInferenceSteps": 200,
            "maxPromptBytes": 16384,
            "maxImageBytes": 8388608,
            "maxImagePixels": 33554432,
            "maxQueued": 16,
        },
        "outputFormats": ["OUTPUT_FORMAT_MP4_H264", "OUTPUT_FORMAT_WEBP"],
        "formatRules": FORMATS,
        "adapters": [{"name": "adapters/fox"}],
        "accelerationProfiles": [{"name": "fast", "description": "Halves the steps.", "ssim": 0.98, "speedup": 2}],
    },
    "deployment": {
        "ready": True,
        "topology": {"worldSize": 4, "copies": 1, "cfg": 2, "ring": 1, "ulysses": 2, "textTensor": 1, "replicas": 1},
        "device": "cuda: NVIDIA H200",
        "dtype": "bfloat16",
        "attentionBackend": "sdpa",
        "loadFormat": "safetensors",
        "numRunning": 1,
        "rankMemory": [{"rank": 0, "peakBytes": 78383153152}, {"rank": 1, "peakBytes": 1073741824}],
    },
    "serverVersion": "0.1.0",
    "unserved": [
        {"rpc": "wan_grpc.v1.AdapterService/LoadAdapter", "description": "this server loads no adapters"},
        {"field": "spec.preview_every_steps", "description": "this server makes no previews"},
    ],
}
TABLE = """\
model                Wan-AI/Wan2.2-I2V-A14B-Diffusers
server               wan-grpc 0.1.0, ready
queue                1 running, 0 waiting, room for 16
tasks                image_to_video
sizes                1280x720, 720x1280, or any in multiples of 16 up to 16384
frames               1 more than a multiple of 4
images               a first image must be given, a last one may be; PNG, JPEG or WebP
text                 the first 512 tokens of a prompt count
topology             world_size 4 = cfg 2 x ring 1 x ulysses 2; text_tensor 1
device               cuda: NVIDIA H200
dtype                bfloat16
attention            sdpa
weights              safetensors
memory               rank 0 73.00 GiB, rank 1 1.00 GiB
adapters             adapters/fox
profiles             fast: Halves the steps. (ssim 0.98, speedup 2)

request              default         at most
prompt                               16384 bytes of UTF-8
image                                8 MiB, 33554432 pixels
size                 1280x720        921600 pixels
num_frames           81              161
num_inference_steps  40              200
fps                  16
guidance_scale       3.5
guidance_scale_2     3
boundary_ratio       0.9
flow_shift           5
format               mp4_h264
negative_prompt      blurred, overexposed, blurred, overexposed, blurred, overexposed, blurred,
                     overexposed, blurred, overexposed, blurred, overexposed,

format               file   crf (usual) quality      pixel formats, the usual one first
mp4_h264             .mp4   0-51 (18)   -            yuv420p, yuv444p10
webp                 .webp  -           1-100 (90)   yuv420p; one frame; at most 50 fps; at most
                                                     50000000 pixels in all frames; sides from 64;
                                                     sides up to 8192

not served
  AdapterService/LoadAdapter   this server loads no adapters
  preview_every_steps          this server makes no previews
"""


def table(answer: dict[str, Any]) -> list[str]:
    return list(model_lines(ParseDict(answer, service_pb.GetModelResponse())))


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {**ANSWER, part: {**ANSWER[part], **values}}


def test_everything_is_in_the_table() -> None:
    """Every fact of GetModel has its line, with the names that requests use, within 100 columns."""
    assert table(ANSWER) == TABLE.splitlines()


@pytest.mark.parametrize(
    ("answer", "name", "text"),
    [
        (
            changed("model", embedded=True, modelId="wan-tiny-t2v"),
            "model",
            "wan-tiny-t2v (embedded: knows coloured shapes in motion alone)",
        ),
        (changed("deployment", ready=False, detail="no ranks yet"), "server", "wan-grpc 0.1.0, no ranks yet"),
        (changed("deployment", device=""), "device", "not known before the ranks are ready"),
        (changed("deployment", rankMemory=[]), "memory", "none"),
        (
            changed("deployment", topology={"worldSize": 2, "cfg": 2, "ring": 1, "ulysses": 1, "replicas": 4}),
            "topology",
            "4 replicas, each of world_size 2 = cfg 2 x ring 1 x ulysses 1; text_tensor 0",
        ),
        (changed("model", adapters=[]), "adapters", "none"),
        (changed("model", accelerationProfiles=[]), "profiles", "none: always the exact computation"),
        (changed("model", sizes=[]), "sizes", "any in multiples of 16 up to 16384"),
    ],
)
def test_what_a_server_may_not_have(answer: dict[str, Any], name: str, text: str) -> None:
    """What is not there is said in words."""
    assert f"{name:<20} {text}" in table(answer)


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({}, "none: videos are made from text alone"),
        ({"takesImage": True}, "a first image may be given, a last one may not; PNG, JPEG or WebP"),
        (
            {"takesImage": True, "needsImage": True},
            "a first image must be given, a last one may not; PNG, JPEG or WebP",
        ),
    ],
)
def test_what_is_said_of_images(rules: dict[str, bool], wanted: str) -> None:
    """Whether images must, may or may not be given; their limits are told where there may be some."""
    lines = table(changed("model", rules={"sizeMultiple": 16, **rules}))
    limits = [line for line in lines if line.startswith("image ")]
    assert (f"images               {wanted}" in lines, len(limits)) == (True, "takesImage" in rules)


def test_one_expert_has_one_guidance() -> None:
    """A model without a boundary has no line for it, nor for the guidance of a second expert."""
    defaults = {name: value for name, value in ANSWER["model"]["defaults"].items() if name != "boundaryRatio"}
    lines = table(changed("model", defaults=defaults))
    assert [line for line in lines if line.startswith(("boundary", "guidance_scale_2"))] == []


def test_a_format_of_a_newer_server() -> None:
    """A format that this client does not know, or of which the server says nothing, has a line nevertheless."""
    answer = ParseDict(ANSWER, service_pb.GetModelResponse())
    answer.model.output_formats.append(99)
    assert "99                          -           -            none" in list(model_lines(answer))


def test_words_are_never_cut_from_their_table() -> None:
    """Long texts go on below themselves, also those without a space, and no line is longer than 100 columns."""
    long = "x" * 250
    lines = table(
        changed("model", modelId=f"{long}", defaults={**ANSWER["model"]["defaults"], "negativePrompt": "雪 " * 90})
    )
    assert (max(map(len, lines)), "".join(line[21:] for line in lines[:4]).startswith(long)) == (100, True)
