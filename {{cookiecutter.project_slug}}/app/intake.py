"""Takes in what connections bring, so that hundreds at once cost each little more than one does.

For a while in each turn of the event loop. What comes after that stays as it came, and is read in
its order in the next turns: others, such as probes, are heard in between.
"""

import asyncio
from collections import deque
from time import monotonic
from typing import Protocol

from app.jobs import Job

TOGETHER = 32
"""Of the requests that come in one turn of the event loop, so many are taken as far as they get
before the next are read: what they are about is in the CPU's cache then."""

SLICE_S = 0.003
"""How long requests are taken in before others are heard (docs/performance.md of the template)."""


class Connection(Protocol):
    def take_in(self) -> None:
        """Read what it has brought, if it is still there."""


class Intake:
    """Of all connections. A request's job begins in the turn of the event loop after it was read,
    when it is known whether it has come alone, and mostly its body is there; or with enough others.
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._left: deque[Connection] = deque()
        self._is_due = False
        self._until = 0.0
        """When to stop. Zero while some are left, who come first."""

    def has_time(self, now: float, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether what has come `now`, by `monotonic`, can be read at once."""
        if not self._is_due:
            self._until = now + SLICE_S
            self._is_due = True
            loop.call_soon(self._go_on, loop)
        return now < self._until

    def leave(self, connection: Connection) -> None:
        """Have what it has brought taken in later."""
        self._until = 0.0
        self._left.append(connection)

    def put(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """Have `job` begun."""
        if not self._is_due:
            self.has_time(monotonic(), loop)
        elif len(self._jobs) >= TOGETHER:
            # Before this one, whose body may not have been read yet.
            self._begin()
        self._jobs.append(job)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        until = monotonic() + SLICE_S
        try:
            while self._left and monotonic() < until:
                self._left.popleft().take_in()
        finally:
            self._is_due = bool(self._left)
            if self._is_due:
                loop.call_soon(self._go_on, loop)
        self._begin()

    def _begin(self) -> None:
        # Those that are put meanwhile wait for the next turn.
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.begin()
