"""Runs of the model that are under way, and all who wait for what they come to.

Who asks for a row that the model is being asked for already follows that run. Each waits for a
future of its own, so that anybody can leave, the first included; when all have, the model is
spared.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from app.deadlines import Deadlines
from app.errors import DeadlineExceeded, PredictionFailed
from app.runner import Outcome
from app.tickets import Ticket

Key = bytes
"""Of a row; equal rows have the same."""

Landing = asyncio.Future[Mapping[Key, Outcome]]
"""Of one who follows: what the run comes to; nothing, if that is of no use to others."""


@dataclass(eq=False, slots=True)
class Run:
    """What the model was asked for, and has not answered yet."""

    keys: tuple[Key, ...]
    """Of its rows. None of them: it cannot be followed, or not yet."""

    leader: asyncio.Future[Sequence[Outcome]]
    """What the first who asked waits for."""

    deadline: float
    """Of that one, by `time.monotonic`."""

    ticket: Ticket[Outcome]
    body: bytes = b""
    """What the rows were read from, if the cache may go by it."""

    is_retry: bool = False
    """Whether who leads, or somebody who follows, has followed another in vain."""


class Flights:
    """Who leads runs, and who follows.

    Args:
        keep: called with a run and what it came to, while `under_way` still has it.
    """

    def __init__(self, keep: Callable[[Run, Sequence[Outcome]], None]) -> None:
        self.under_way: dict[Key, Run] = {}
        """By the keys of their rows; of two for the same row mostly the later one."""

        self._keep = keep
        self._loop = asyncio.get_running_loop()
        self._waiting: Deadlines[asyncio.Future[Any]] = Deadlines(_expire)

    def end(self, run: Run) -> None:
        """Nobody can follow it any more."""
        for key in run.keys:
            if self.under_way.get(key) is run:
                del self.under_way[key]

    async def follow(self, run: Run, deadline: float) -> Mapping[Key, Outcome]:
        """What it comes to; nothing, if that is of no use to others.

        Raises:
            ServiceError: the model could not score the row, once more, or did not until `deadline`.
        """
        landing = self.join(run, deadline)
        try:
            return await landing
        finally:
            self.part(run, landing)
            # An error knows this frame by its traceback; the frame must not know the error.
            del landing

    def join(self, run: Run, deadline: float) -> Landing:
        """What `follow` gives, later; to be parted with."""
        landing: Landing = self._loop.create_future()
        outlet = run.ticket.outlet
        if isinstance(outlet, asyncio.Future) and outlet.done():
            # The one who leads has not woken up yet.
            if outlet.cancelled() or outlet.exception():
                self.end(run)
                landing.set_result({})
            else:
                landing.set_result(dict(zip(run.keys, outlet.result(), strict=True)))
            return landing
        if not isinstance(outlet, _Flight):
            self._waiting.add(run.leader, run.deadline)
            outlet = run.ticket.outlet = _Flight(self, run)
        run.ticket.prolong(deadline)
        outlet.waiting.add(landing)
        self._waiting.add(landing, deadline)
        return landing

    def part(self, run: Run, waiter: asyncio.Future[Any]) -> None:
        """Who waits for `waiter` has its answer, or gives up."""
        self._waiting.discard(waiter)
        if not waiter.cancel() and not waiter.cancelled():
            # Another error may have come first; nobody has to hear of both.
            waiter.exception()
        flight = run.ticket.outlet
        if isinstance(flight, _Flight) and flight.leave(waiter):
            self._waiting.discard(run.leader)

    def land(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """What it came to is kept, and nobody can follow it any more."""
        try:
            self._keep(run, outcomes)
        finally:
            self.end(run)


class _Flight:
    """The outlet of a run that somebody follows, in place of the future of who leads."""

    def __init__(self, flights: Flights, run: Run) -> None:
        self.waiting: set[Landing] = set()
        """The futures of those who follow."""

        self._flights = flights
        self._run = run
        self._leader = run.leader
        self._is_done = False

    def leave(self, waiter: asyncio.Future[Any]) -> bool:
        """Whether nobody waits any more; `waiter`, which is done, does not."""
        self.waiting.discard(waiter)
        if self.waiting or not self._leader.done():
            return False
        self._run.ticket.withdraw()
        # It knows this, which knows it.
        self._run.ticket.outlet = self._leader
        return True

    def done(self) -> bool:
        return self._is_done

    def set_result(self, outcomes: Sequence[Outcome]) -> None:
        self._is_done = True
        try:
            self._flights.land(self._run, outcomes)
        finally:
            # That it could not be kept is no reason not to say it.
            if not self._leader.done():
                self._leader.set_result(outcomes)
            said = dict(zip(self._run.keys, outcomes, strict=True))
            for landing in self.waiting:
                if not landing.done():
                    landing.set_result(said)

    def set_exception(self, error: Exception) -> None:
        self.cancel()
        if not self._leader.done():
            self._leader.set_exception(error)
        for landing in self.waiting:
            if landing.done():
                continue
            if self._may_ask_again(error):
                landing.set_result({})
            else:
                # Of the same row they would see the same.
                same = copy(error).with_traceback(None)
                same.__cause__ = error.__cause__
                landing.set_exception(same)

    def _may_ask_again(self, error: Exception) -> bool:
        """Whether what one has seen need not be what all who follow would."""
        # That who led was too late is not true of everybody, and what is wrong with one of several
        # rows, not of each.
        if isinstance(error, DeadlineExceeded) or len(self._run.keys) > 1:
            return True
        # A model may fail once; of all who follow one finds out, for all.
        return isinstance(error, PredictionFailed) and not self._run.is_retry

    def cancel(self) -> None:
        """There will be no outcomes."""
        if not self._is_done:
            self._is_done = True
            self._flights.end(self._run)


def _expire(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_exception(DeadlineExceeded("The model did not answer in time."))
