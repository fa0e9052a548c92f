"""Takes in what connections bring, so that hundreds at once cost each little more than one does.

Requests are taken as far as they get by thirty-twos, and a turn of the event loop takes in all that
has come, or as much as it may. But once somebody new knocks, who may be a probe, what comes stays
as it came, to be read in its order in later turns, and the new one is heard in between.
"""

import asyncio
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

from app.jobs import Job

TOGETHER = 32
"""Of the requests that come in one turn of the event loop, so many are taken as far as they get
before the next are read: what they are about is in the CPU's cache then."""

SLICE_S = 0.003
"""How long requests are taken in before it is seen who knocks."""

LONGEST_S = 0.05
"""How long they are taken in at one go, if nobody does (docs/performance.md of the template): first
those that were left, then those that come. Who is connected already, as a scraper may be, is not
heard to knock."""

HASTE_S = 0.03
"""How long there are no more than slices, once somebody has: to be accepted, read and answered
takes some turns."""


class Intake:
    """Of all connections. The job of a request that is read as it comes begins in the next turn of
    the event loop, when it is known whether it has come alone, and mostly its body is there; or
    with enough others.
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._left: deque[Callable[[], object]] = deque()
        self._is_due = False
        self._look_at = 0.0
        """When to see who knocks."""

        self._until = 0.0
        """When to stop."""

        self._haste_until = 0.0
        self._door = select.poll()

    def watch(self, sockets: Iterable[socket.socket]) -> None:
        """Hear who knocks at `sockets`."""
        for listening in sockets:
            self._door.register(listening, select.POLLIN)

    def watch_no_more(self) -> None:
        """They will be closed."""
        self._door = select.poll()

    def has_time(self, now: float, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether what has come `now`, by `monotonic`, can be read at once."""
        if not self._is_due:
            self._go_on_soon(now, loop)
        return not self._left and (now < self._look_at or self._may_go_on(now))

    def leave(self, take_in: Callable[[], object]) -> None:
        """Have `take_in` called when it is the turn of what has come now."""
        self._left.append(take_in)

    def put(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """Have `job` begun."""
        if not self._is_due:
            self._go_on_soon(monotonic(), loop)
        elif len(self._jobs) >= TOGETHER:
            # Before this one, whose body may not have been read yet.
            self._begin()
        self._jobs.append(job)

    def hurry(self, now: float) -> None:
        """Somebody has knocked, and is to be heard soon."""
        self._haste_until = now + HASTE_S

    def _go_on_soon(self, now: float, loop: asyncio.AbstractEventLoop) -> None:
        self._is_due = True
        loop.call_soon(self._go_on, loop)
        self._start(now)

    def _start(self, now: float) -> None:
        self._look_at = now + SLICE_S
        self._until = now + LONGEST_S

    def _may_go_on(self, now: float) -> bool:
        if now >= self._until or now < self._haste_until:
            return False
        if self._door.poll(0):
            self.hurry(now)
            return False
        self._look_at = now + SLICE_S
        return True

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._start(now := monotonic())
        try:
            while self._left and (now < self._look_at or self._may_go_on(now)):
                self._left.popleft()()
                now = monotonic()
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
