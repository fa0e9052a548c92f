"""One run for all processes that miss the same rows, by locks in the store that they share.

For models that take so long that asking the store a few times more is nothing beside it. A lock
is a hint: where the store fails, or a run takes longer than locks last, more than one process
runs the model, and nobody waits longer than without.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import NamedTuple

from app.batching import Outlet, Ticket
from app.errors import DeadlineExceeded, ServiceError
from app.predictor import BaseFeatures, BasePrediction, ItemError

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.1
"""Between two looks at what another process is about to say; a pause is half as long again as the
one before."""

Key = bytes
Outcome = BasePrediction | ItemError
Rows = Mapping[Key, BaseFeatures]
Submit = Callable[[Sequence[BaseFeatures], Outlet[Outcome]], Ticket[Outcome]]


class Locks(NamedTuple):
    """What a run needs of the store; each is given keys of rows."""

    take: Callable[[Sequence[Key]], Awaitable[Sequence[bool]]]
    """Whether this process is to run the model for each of them; so it is if nobody can tell."""

    release: Callable[[Sequence[Key]], None]
    recall: Callable[[Sequence[Key], float], Awaitable[Mapping[Key, Outcome]]]
    """What is known by now; looks no longer than until a deadline."""


class SharedRun:
    """The ticket of rows of which other processes may run some; see `app.batching.Ticket`."""

    def __init__(
        self, rows: Rows, submit: Submit, outlet: Outlet[Outcome], deadline: float, locks: Locks
    ) -> None:
        self.outlet = outlet
        self._rows = rows
        self._submit = submit
        self._deadline = deadline
        self._locks = locks
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
        said: dict[Key, Outcome] = {}
        pause_s = FIRST_PAUSE_S
        try:
            while missing := [key for key in self._rows if key not in said]:
                fresh = await self._score_unlocked(missing)
                said |= fresh
                if not fresh:
                    left_s = self._deadline - monotonic()
                    if left_s <= 0:
                        raise DeadlineExceeded("The model did not answer in time.")
                    await asyncio.sleep(min(pause_s, left_s))
                    pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
        except ServiceError as error:
            if not self.outlet.done():
                self.outlet.set_exception(error)
        else:
            if not self.outlet.done():
                self.outlet.set_result([said[key] for key in self._rows])

    async def _score_unlocked(self, keys: Sequence[Key]) -> Mapping[Key, Outcome]:
        """What is known of `keys`, and what the model says of those that no other process has."""
        taken = await self._locks.take(keys)
        mine = [key for key, is_mine in zip(keys, taken, strict=True) if is_mine]
        try:
            # Between the last look and the lock, its holder may have answered.
            known = await self._locks.recall(keys, self._deadline)
            unknown = [key for key in mine if key not in known]
            outcomes = await self._score([self._rows[key] for key in unknown]) if unknown else []
            return {**known, **dict(zip(unknown, outcomes, strict=True))}
        finally:
            # Who leads writes what was said in the next turn, and both go together.
            self._locks.release(mine)

    async def _score(self, rows: Sequence[BaseFeatures]) -> Sequence[Outcome]:
        answer: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        ticket = self._ticket = self._submit(rows, answer)
        ticket.prolong(self._deadline)
        try:
            return await answer
        finally:
            self._ticket = None
            ticket.withdraw()
            # An error knows this frame by its traceback; the frame must not know the error.
            del ticket, answer
