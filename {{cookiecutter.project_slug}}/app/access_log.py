"""A line for each request in the log."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json

from app.logs import LINE_BYTES, writes_json
from app.settings import Settings


class AccessLog:
    """As JSON a line is written past `logging`, which would take as long as all that is done to
    answer a request for a small model (docs/performance.md of the template).
    """

    name = "app.access"

    def __init__(self, settings: Settings) -> None:
        self._level = logging.getLevelNamesMapping()[settings.log_level.upper()]
        self.writes_json = writes_json(settings)
        self._logger = logging.getLogger(self.name)
        self._lines: list[bytes] = []
        self._ends: dict[int, bytes] = {}
        """Of the lines until the next `flush`, by level: they have the same time."""

    def takes(self, level: int) -> bool:
        return level >= self._level

    def write(self, level: int, fields: dict[str, Any]) -> None:
        """A line; it may wait for `flush`."""
        if self.writes_json:
            self.write_line(to_json(fields)[:-1] + self.end_of_line(level))
        else:
            self._logger.log(level, "request", extra=fields)

    def write_line(self, line: bytes) -> None:
        """The same of a line of JSON."""
        self._lines.append(line)

    def end_of_line(self, level: int) -> bytes:
        """Of the JSON of all lines until `flush`: what follows the fields of the request."""
        end = self._ends.get(level)
        if end is None:
            fields = {
                "event": "request",
                "level": logging.getLevelName(level).lower(),
                "logger": self.name,
                "timestamp": datetime.now(UTC),
            }
            end = self._ends[level] = b"," + to_json(fields)[1:] + b"\n"
        return end

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        self._ends.clear()
        piece = b""
        for line in lines:
            if len(piece) + len(line) > LINE_BYTES:
                _write(piece)
                piece = b""
            piece += line
        if piece:
            _write(piece)


def _write(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()
