"""One form for every log line, gunicorn's and uvicorn's included: JSON, or for a terminal."""

import json
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cached_property
from time import monotonic
from typing import Any, Protocol

current_request_id: ContextVar[str] = ContextVar("current_request_id")

current_ids: dict[str, Callable[[], str | None]] = {
    "request_id": lambda: current_request_id.get(None)
}
"""What the request is called on whose behalf a line is written. Tracing adds its own: gunicorn's
process imports this file, and needs no tracing."""


LINE_BYTES = 4096
"""The longest line of JSON, its end included. Linux takes so much in one piece (PIPE_BUF, pipe(7)),
so that what several processes write does not get mixed up, however slowly it is read."""

PLAIN_FIELDS = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime"}
"""Of a record that was logged without `extra`."""

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
    level = settings.log_level.upper()
    server = {"level": level, "handlers": ["stderr"], "propagate": False}
    # gunicorn tells of a worker's start and stop already.
    uvicorn = {"level": "ERROR" if level == "ERROR" else "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"structured": {"()": Lines, "as_json": writes_json(settings)}},
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


def writes_json(settings: LogSettings) -> bool:
    is_auto = settings.log_format == "auto"
    return settings.log_format == "json" or (is_auto and not sys.stderr.isatty())


class Lines(logging.Formatter):
    """Has structlog write the lines, unless they are JSON and there is nothing to them.

    So are all that gunicorn's own process writes while all is well, and without structlog that is a
    tenth smaller (docs/performance.md of the template).
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    @cached_property
    def _structlog(self) -> logging.Formatter:
        from app.structured import formatter

        return formatter(ids=current_ids, json_bytes=LINE_BYTES if self._as_json else None)

    def format(self, record: logging.LogRecord) -> str:
        if self._as_json and _is_plain(record):
            line = json.dumps(
                {
                    "event": record.getMessage(),
                    "level": record.levelname.lower(),
                    "logger": record.name,
                    "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
                }
            )
            if len(line) < LINE_BYTES:
                return line
        return self._structlog.format(record)


def _is_plain(record: logging.LogRecord) -> bool:
    if record.exc_info or record.stack_info or record.__dict__.keys() - PLAIN_FIELDS:
        return False
    return not any(current_id() for current_id in current_ids.values())


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
