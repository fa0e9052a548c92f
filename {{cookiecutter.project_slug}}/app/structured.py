"""Log lines by structlog, which knows how to show fields and tracebacks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

Ids = Mapping[str, Callable[[], str | None]]


def formatter(*, ids: Ids, json_bytes: int | None) -> structlog.stdlib.ProcessorFormatter:
    """For records of the standard library's logging.

    Args:
        ids: what is added to each line, as far as there is such an id at that moment.
        json_bytes: the longest line of JSON, its end included. None: lines are for a terminal.
    """
    fields: list[Processor] = [
        partial(_add_ids, ids),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Local variables hold what callers sent, keys included: tracebacks are shown without them.
    rendering: list[Processor] = (
        [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            partial(_json_line, json_bytes),
        ]
        if json_bytes
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=fields,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )


def _json_line(max_bytes: int, logger: WrappedLogger, name: str, event: EventDict) -> str:
    """What is too long loses the outer frames of its tracebacks, and the ends of its texts."""
    line = str(_to_json(logger, name, event))
    for most in (20, 5, 1):
        if len(line) < max_bytes:
            return line
        line = str(_to_json(logger, name, _shortened(event, most) | {"is_shortened": True}))
    if len(line) >= max_bytes:
        kept = {key: event[key] for key in ("level", "logger", "timestamp") if key in event}
        kept |= {"event": str(event.get("event"))[:200], "is_shortened": True}
        line = str(_to_json(logger, name, kept))
    return line


_to_json = structlog.processors.JSONRenderer()


def _shortened(value: Any, most: int) -> Any:
    """With at most so many frames in a traceback, other items and hundreds of characters."""
    if isinstance(value, dict):
        return {
            key: _shortened(item[-most:] if key == "frames" else item, most)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_shortened(item, most) for item in value[:most]]
    if isinstance(value, int | float | None):
        return value
    return str(value)[: 100 * most]


def _add_ids(ids: Ids, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, current_id in ids.items():
        if value := current_id():
            event.setdefault(name, value)
    return event
