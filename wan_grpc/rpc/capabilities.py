"""The answer of GetModel: what the model allows, how it is run, and what of the API is not served."""

from wan_grpc import __version__
from wan_grpc.domain.formats import FORMATS, QUALITIES, OutputFormat
from wan_grpc.domain.status import EngineStatus
from wan_grpc.domain.topology import Topology
from wan_grpc.domain.variants import Defaults, ModelCard, Task
from wan_grpc.rpc.convert import OUTPUT_FORMATS, PIXEL_FORMATS, to_rank_memory
from wan_grpc.rpc.unserved import UNSERVED_FIELDS, UNSERVED_METHODS
from wan_grpc.v1 import generation_pb2, model_pb2
from wan_grpc.v1.video_generation_service_pb2 import GetModelResponse

TASKS = {
    Task.TEXT_TO_VIDEO: generation_pb2.TASK_TEXT_TO_VIDEO,
    Task.IMAGE_TO_VIDEO: generation_pb2.TASK_IMAGE_TO_VIDEO,
    Task.TEXT_IMAGE_TO_VIDEO: generation_pb2.TASK_TEXT_IMAGE_TO_VIDEO,
}


def describe(card: ModelCard, status: EngineStatus) -> GetModelResponse:
    """All that a caller needs to know before a request."""
    return GetModelResponse(
        model=_model(card, status),
        deployment=_deployment(status),
        server_version=__version__,
        unserved=[
            *(model_pb2.UnservedPart(rpc=name, description=sentence) for name, sentence in UNSERVED_METHODS.items()),
            *(model_pb2.UnservedPart(field=path, description=sentence) for path, sentence in UNSERVED_FIELDS.items()),
        ],
    )


def _model(card: ModelCard, status: EngineStatus) -> model_pb2.Model:
    return model_pb2.Model(
        model_id=card.model_id,
        embedded=card.embedded,
        tasks=[TASKS[card.task]],
        sizes=[model_pb2.FrameSize(width=width, height=height) for width, height in card.sizes],
        rules=model_pb2.ModelRules(
            size_multiple=card.size_multiple,
            num_frames_multiple=card.temporal_factor,
            max_text_tokens=card.max_text_tokens,
            max_side=card.max_side,
            takes_image=card.takes_image,
            needs_image=card.needs_image,
            takes_last_image=card.takes_last_image,
            needs_last_image=card.needs_last_image,
        ),
        defaults=_defaults(card.defaults),
        limits=model_pb2.ModelLimits(
            max_area=card.limits.max_area,
            max_num_frames=card.limits.max_num_frames,
            max_inference_steps=card.limits.max_inference_steps,
            max_prompt_bytes=card.limits.max_prompt_bytes,
            max_image_bytes=card.limits.max_image_bytes if card.takes_image else 0,
            max_image_pixels=card.limits.max_image_pixels if card.takes_image else 0,
            max_queued=status.queue_limit,
        ),
        output_formats=[OUTPUT_FORMATS[output_format] for output_format in card.formats],
        format_rules=[_format_rules(output_format) for output_format in card.formats],
    )


def _format_rules(output_format: OutputFormat) -> model_pb2.FormatRules:
    rule = FORMATS[output_format]
    return model_pb2.FormatRules(
        output_format=OUTPUT_FORMATS[output_format],
        file_suffix=rule.suffix,
        pixel_formats=[PIXEL_FORMATS[pixel_format] for pixel_format in rule.pixel_formats],
        crf=None if rule.crf is None else _range(*rule.crf),
        quality=None if rule.default_quality is None else _range(*QUALITIES, rule.default_quality),
        is_picture=rule.is_picture,
        max_fps=rule.max_fps,
        max_pixels=rule.max_pixels,
        max_side=rule.max_side,
        min_side=rule.min_side,
    )


def _range(least: int, most: int, usual: int) -> model_pb2.IntegerRange:
    return model_pb2.IntegerRange(min=least, max=most, default=usual)


def _defaults(defaults: Defaults) -> model_pb2.ModelDefaults:
    return model_pb2.ModelDefaults(
        width=defaults.width,
        height=defaults.height,
        num_frames=defaults.num_frames,
        fps=defaults.fps,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        guidance_scale_2=defaults.guidance_scale_2,
        flow_shift=defaults.flow_shift,
        boundary_ratio=defaults.boundary_ratio,
        negative_prompt=defaults.negative_prompt,
        output_format=OUTPUT_FORMATS[OutputFormat.MP4_H264],
    )


def _deployment(status: EngineStatus) -> model_pb2.Deployment:
    return model_pb2.Deployment(
        ready=status.ready,
        detail=status.detail,
        topology=_topology(status.topology, status.num_replicas),
        device=status.device,
        dtype=status.dtype,
        attention_backend=status.attention,
        load_format=status.load_format,
        num_queued=status.num_queued,
        num_running=status.num_running,
        rank_memory=[to_rank_memory(memory) for memory in status.rank_memory],
    )


def _topology(topology: Topology, num_replicas: int) -> model_pb2.Topology:
    return model_pb2.Topology(
        world_size=topology.world_size,
        copies=1,
        cfg=topology.cfg,
        ring=topology.ring,
        ulysses=topology.ulysses,
        text_tensor=topology.text_tensor,
        replicas=num_replicas,
    )
