"""One run for all processes that miss the same rows, by locks in the store that they share.

For models that take so long that asking the store a few times more is nothing beside it. A lock
is a hint and protects nothing: where the store fails, a process dies, or a run takes longer than
locks last, more than one process runs the model. Nobody waits for others longer than a lock lasts,
nor for more than half of the time that is left.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import NamedTuple

from app.errors import PredictionFailed, ServiceError
from app.flights import Key
from app.predictor import BaseFeatures
from app.runner import Outcome
from app.tickets import Outlet, Ticket

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.1
"""Between two looks at what another process is about to say; a pause is half as long again as the
one before."""

Rows = Mapping[Key, BaseFeatures]
Submit = Callable[[Sequence[BaseFeatures], Outlet[Outcome]], Ticket[Outcome]]


class Others(NamedTuple):
    """What a run has to do with other processes; each function is given keys of rows."""

    lock_s: float
    """How long a lock lasts."""

    take: Callable[[Sequence[Key], float], Awaitable[Sequence[bool]]]
    """Whether this process is to run the model for each of them, until a deadline; so it is if
    nobody can tell."""

    release: Callable[[Sequence[Key]], None]
    recall: Callable[[Sequence[Key], float], Awaitable[Mapping[Key, Outcome]]]
    """What is known by now; looks no longer than until a deadline."""

    keep: Callable[[Sequence[Key], Sequence[Outcome]], None]
    """Tell them what the model has said."""


class SharedRun:
    """The ticket of rows of which other processes may run some; see `app.tickets.Ticket`."""

    def __init__(
        self, rows: Rows, submit: Submit, outlet: Outlet[Outcome], deadline: float, others: Others
    ) -> None:
        self.outlet = outlet
        self._rows = rows
        self._submit = submit
        self._deadline = deadline
        self._others = others
        self._ticket: Ticket[Outcome] | None = None
        self._task = asyncio.create_task(self._run())

    def withdraw(self) -> None:
        self._task.cancel()
        self.outlet.cancel()

    def prolong(self, deadline: float) -> None:
        self._deadline = max(deadline, self._deadline)
        if self._ticket:
            self._ticket.prolong(deadline)

    async def _run(self) -> None:
        try:
            outcomes = await self._outcomes()
        except asyncio.CancelledError:
            # Of nobody's interest; and the error would know this task, which knows the error.
            pass
        except Exception as error:
            told = error if isinstance(error, ServiceError) else PredictionFailed("Not scored.")
            if not self.outlet.done():
                # Its traceback knows this frame, which knows the outlet.
                self.outlet.set_exception(told.with_traceback(None))
        else:
            if not self.outlet.done():
                self.outlet.set_result(outcomes)

    async def _outcomes(self) -> Sequence[Outcome]:
        said: dict[Key, Outcome] = {}
        pause_s, now = FIRST_PAUSE_S, monotonic()
        patient_until = now + min(self._others.lock_s, (self._deadline - now) / 2)
        while missing := [key for key in self._rows if key not in said]:
            if monotonic() < patient_until:
                fresh = await self._recall_or_score(missing)
            else:
                fresh = await self._score(missing)
            said |= fresh
            if not fresh:
                await asyncio.sleep(pause_s)
                pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
        return [said[key] for key in self._rows]

    async def _recall_or_score(self, keys: Sequence[Key]) -> Mapping[Key, Outcome]:
        """What is known of `keys`, and what the model says of those that no other process has."""
        # Who is cancelled while it asks does not know what it has got.
        mine = keys
        try:
            taken = await self._others.take(keys, self._deadline)
            mine = [key for key, is_mine in zip(keys, taken, strict=True) if is_mine]
            # Between the last look and the lock, its holder may have answered.
            known = await self._others.recall(keys, self._deadline)
            unknown = [key for key in mine if key not in known]
            return {**known, **(await self._score(unknown) if unknown else {})}
        finally:
            self._others.release(mine)

    async def _score(self, keys: Sequence[Key]) -> Mapping[Key, Outcome]:
        answer: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        ticket = self._ticket = self._submit([self._rows[key] for key in keys], answer)
        ticket.prolong(self._deadline)
        try:
            outcomes = await answer
            self._others.keep(keys, outcomes)
            return dict(zip(keys, outcomes, strict=True))
        finally:
            self._ticket = None
            ticket.withdraw()
            # An error knows this frame by its traceback; the frame must not know the error.
            del ticket, answer
