"""One form for every log line, gunicorn's and uvicorn's included: JSON, or for a terminal."""

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any, Protocol

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

current_request_id: ContextVar[str] = ContextVar("current_request_id")

current_ids: dict[str, Callable[[], str | None]] = {
    "request_id": lambda: current_request_id.get(None)
}
"""What the request is called on whose behalf a line is written. Tracing adds its own: gunicorn's
process imports this file, and needs no tracing."""


LINE_BYTES = 4096
"""The longest line of JSON, its end included. Linux takes so much in one piece (PIPE_BUF, pipe(7)),
so that what several processes write does not get mixed up, however slowly it is read."""

STORM_LINES = 10
STORM_S = 10.0
STORM_KINDS = 100


class LogSettings(Protocol):
    """A part of `app.settings.Settings`."""

    @property
    def log_level(self) -> str: ...

    @property
    def log_format(self) -> str: ...


def logging_config(settings: LogSettings) -> dict[str, Any]:
    """For `logging.config.dictConfig`.

    Modules log through the standard library and pass fields as `extra`. The id of the request
    on whose behalf a line is written is in the line.
    """
    as_json = writes_json(settings)
    fields: list[Processor] = [
        _add_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Local variables hold what callers sent, keys included: tracebacks are shown without them.
    rendering: list[Processor] = (
        [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            _json_line,
        ]
        if as_json
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    level = settings.log_level.upper()
    server = {"level": level, "handlers": ["stderr"], "propagate": False}
    # gunicorn tells of a worker's start and stop already.
    uvicorn = {"level": "ERROR" if level == "ERROR" else "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "structured": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": fields,
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    *rendering,
                ],
            }
        },
        "filters": {"storm": {"()": StormFilter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "filters": ["storm"],
                "stream": "ext://sys.stderr",
                "formatter": "structured",
            }
        },
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {"gunicorn.error": server, "gunicorn.access": server, "uvicorn.error": uvicorn},
    }


def _json_line(logger: WrappedLogger, name: str, event: EventDict) -> str:
    """What is too long loses the outer frames of its tracebacks, and the ends of its texts."""
    line = str(_to_json(logger, name, event))
    for most in (20, 5, 1):
        if len(line) < LINE_BYTES:
            return line
        line = str(_to_json(logger, name, _shortened(event, most) | {"is_shortened": True}))
    if len(line) >= LINE_BYTES:
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


def writes_json(settings: LogSettings) -> bool:
    is_auto = settings.log_format == "auto"
    return settings.log_format == "json" or (is_auto and not sys.stderr.isatty())


def _add_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, current_id in current_ids.items():
        if value := current_id():
            event.setdefault(name, value)
    return event


class StormFilter(logging.Filter):
    """Of warnings, errors and tracebacks of one kind, lets `STORM_LINES` through in `STORM_S`.

    The first after that says in `left_out` how many did not get through. Each of their requests
    has its line in the access log.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and not record.exc_info:
            return True
        kind = (*_place_of(record), *_kind_of_error(record))
        # Not the time of the record, which is that of a clock that may be set back.
        now = self._clock()
        since, count = self._seen.get(kind, (now, 0))
        if now >= since + STORM_S:
            if count > STORM_LINES:
                record.left_out = count - STORM_LINES
            since, count = now, 0
        if len(self._seen) >= STORM_KINDS:
            self._seen.clear()
        self._seen[kind] = since, count + 1
        return count < STORM_LINES


def _place_of(record: logging.LogRecord) -> tuple[object, ...]:
    if record.name == "py.warnings":
        # All are logged at one place; their texts begin with their own.
        return (record.getMessage().partition(": ")[0],)
    return record.pathname, record.lineno


def _kind_of_error(record: logging.LogRecord) -> tuple[object, ...]:
    """Of which model, what was raised in the first place, and where."""
    error = record.exc_info[1] if record.exc_info else None
    while error and error.__cause__:
        error = error.__cause__
    frame = error.__traceback__ if error else None
    while frame and frame.tb_next:
        frame = frame.tb_next
    where = (frame.tb_frame.f_code.co_filename, frame.tb_lineno) if frame else ()
    return (getattr(record, "model", None), type(error), *where)
