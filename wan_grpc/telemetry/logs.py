"""Log lines on stderr, as JSON or for people, each with the request, generation and rank that it belongs to.

Knows structlog and what is worth a line. Does not know who observes, nor the terminal's other output.
"""

import logging
import sys
from collections.abc import MutableSequence
from typing import Literal, TextIO

import structlog
from structlog.types import Processor

from wan_grpc.domain.errors import CANCELLING_REASONS
from wan_grpc.domain.observations import (
    Admitted,
    Ended,
    GroupReady,
    GroupRecovered,
    GroupRestarting,
    Observation,
    RankChanged,
    RankFaulted,
    Refused,
    StageEnded,
    Started,
    StepEnded,
)

LogFormat = Literal["console", "json"]


def choose_format(log_format: str, stream: TextIO | None = None) -> LogFormat:
    """What `auto` stands for: lines for people on a terminal, JSON anywhere else."""
    if log_format == "auto":
        return "console" if (stream or sys.stderr).isatty() else "json"
    return "console" if log_format == "console" else "json"


def configure(*, level: str, log_format: str) -> None:
    """Send the log of this process to stderr: structlog's and that of every library that uses `logging`."""
    shared: MutableSequence[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()], processors=_rendering(log_format)
        )
    )
    logging.captureWarnings(True)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _rendering(log_format: str) -> list[Processor]:
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if choose_format(log_format) == "json":
        return [strip, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )
    return [strip, plain]


def observe(observation: Observation) -> None:
    """Log what an operator would want to read; what is only worth counting stays silent."""
    log = structlog.stdlib.get_logger("wan_grpc")
    match observation:
        case Refused(reason=reason):
            log.info("request refused", reason=reason)
        case Admitted(name=name, request_id=request_id):
            named = {} if request_id is None else {"request_id": request_id}  # else the call's own id stands there
            log.info("generation admitted", generation=name, **named)
        case Started(name=name, wait_s=wait_s):
            log.info("generation started", generation=name, wait_s=round(wait_s, 3))
        case StepEnded(name=name, expert=expert, seconds=seconds):
            log.debug("step ended", generation=name, expert=expert, seconds=round(seconds, 6))
        case StageEnded(name=name, stage=stage, seconds=seconds):
            log.debug("stage ended", generation=name, stage=stage, seconds=round(seconds, 3))
        case Ended():
            _log_end(log, observation)
        case RankChanged() | RankFaulted() | GroupRestarting() | GroupRecovered():
            _log_ranks(log, observation)
        case GroupReady():
            _log_ready(log, observation)


def _log_ranks(
    log: structlog.stdlib.BoundLogger, observation: RankChanged | RankFaulted | GroupRestarting | GroupRecovered
) -> None:
    match observation:
        case RankChanged(rank=rank, up=up):
            log.info("rank is up" if up else "rank is down", rank=rank)
        case RankFaulted(rank=rank, reason=reason):
            log.error("a generation failed on a rank", rank=rank, reason=reason)
        case GroupRestarting(cause=cause, detail=detail):
            log.error("ranks are being started again", cause=cause, detail=detail)
        case GroupRecovered(seconds=seconds):
            log.info("ranks have recovered", recovery_s=round(seconds, 3))


def _log_end(log: structlog.stdlib.BoundLogger, ended: Ended) -> None:
    is_fault = ended.reason is not None and ended.reason not in CANCELLING_REASONS
    write = log.error if is_fault else log.info
    why = {} if ended.reason is None else {"reason": ended.reason, "detail": ended.message}
    write(f"generation {ended.state}", generation=ended.name, duration_s=round(ended.duration_s, 3), **why)


def _log_ready(log: structlog.stdlib.BoundLogger, ready: GroupReady) -> None:
    log.info(
        "ranks are ready",
        model=ready.card.model_id,
        world_size=ready.topology.world_size,
        device=ready.device,
        dtype=ready.dtype,
        attention=ready.attention,
        load_s=round(ready.load_s, 3),
    )
