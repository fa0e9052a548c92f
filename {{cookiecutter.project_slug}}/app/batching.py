"""The batch collector: gathers the rows of many requests into batches for one model.

Late binding: which rows form a batch is decided when a slot of the model is free, never before.
Everything happens in event handlers on one event loop (a request comes or leaves, a batch ends, a
wait is over); there is no task that polls and none that could die unseen. Times are in seconds on
the loop's clock, sizes in rows.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from app.errors import DeadlineExceeded, NotReady, Overloaded, PredictionFailed
from app.waiting import BatchCost, WaitPolicy

log = logging.getLogger(__name__)

RowT = TypeVar("RowT")
OutcomeT = TypeVar("OutcomeT")

MAX_RERUNS = 16
"""Runs that may be spent on finding the request that makes a batch fail: enough for one among
a hundred, or for three among thirty-two."""


class State(StrEnum):
    ACCEPTING = "accepting"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Limits:
    """Of one collector. `max_wait` bounds what a wait policy asks for, once a slot is free."""

    max_rows: int
    queue_max_rows: int
    max_wait: float
    slots: int = 1


@dataclass(eq=False, slots=True)
class _Request(Generic[RowT, OutcomeT]):
    """Rows that one caller waits for. They may end up in several batches, in order."""

    rows: Sequence[RowT]
    deadline: float
    group: tuple[int, Hashable]
    """Priority, the smaller one first, and shape key: only equal keys share a batch."""

    number: int
    """By order of arrival."""

    queued: float
    future: asyncio.Future[list[OutcomeT]]
    bound: int = 0
    """Rows that are in a batch, or were."""

    outcomes: dict[int, OutcomeT] = field(default_factory=dict)
    """By the number of the row; batches may end in another order than they began."""

    @property
    def waiting(self) -> int:
        return len(self.rows) - self.bound


@dataclass(frozen=True, slots=True)
class _Part(Generic[RowT, OutcomeT]):
    """The rows of a request that are in one batch."""

    request: _Request[RowT, OutcomeT]
    first: int
    rows: Sequence[RowT]


class Collector(Generic[RowT, OutcomeT]):
    """Runs `run` on batches of at most `limits.max_rows`, in `limits.slots` batches at a time.

    `run` gets a list of rows and gives one outcome for each, in order; it raises
    PredictionFailed if it cannot. Each accepted request is answered exactly once: with its
    outcomes, or with an error that no other request shares.
    """

    def __init__(
        self,
        run: Callable[[list[RowT]], Awaitable[Sequence[OutcomeT]]],
        limits: Limits,
        policy: WaitPolicy,
    ) -> None:
        self.state = State.ACCEPTING
        self.limits = limits
        self.rows_waiting = 0
        self.cost = BatchCost()
        self._run = run
        self._policy = policy
        self._queues: dict[tuple[int, Hashable], OrderedDict[_Request[RowT, OutcomeT], None]] = {}
        self._accepted: set[_Request[RowT, OutcomeT]] = set()
        self._batches: set[asyncio.Task[None]] = set()
        self._wake: asyncio.Handle | None = None
        self._count = 0
        self._free_since = 0.0

    @property
    def is_idle(self) -> bool:
        return not self._batches and not self.rows_waiting

    def expected_wait(self) -> float:
        """How long a request that came now would wait until its batch begins, at the least."""
        batches = len(self._batches) + self.rows_waiting // self.limits.max_rows
        return (batches // self.limits.slots) * self.cost(self.limits.max_rows)

    async def submit(
        self,
        rows: Sequence[RowT],
        deadline: float,
        *,
        priority: int = 0,
        shape_key: Hashable = None,
    ) -> list[OutcomeT]:
        """The outcomes of `rows`, in order. A caller that is cancelled gives up its place.

        Raises:
            NotReady: no more requests are taken.
            Overloaded: the queue is full, or the deadline would pass in it.
            DeadlineExceeded: the deadline passed before a batch began.
            PredictionFailed: the model failed on these rows.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._admit(len(rows), now, deadline)
        group = (priority, shape_key)
        self._count += 1
        request = _Request[RowT, OutcomeT](
            rows, deadline, group, self._count, now, loop.create_future()
        )
        if self.is_idle:
            self._policy.found_idle(now)
        self._policy.arrived(now, len(rows))
        self._accepted.add(request)
        self._queues.setdefault(group, OrderedDict())[request] = None
        self.rows_waiting += len(rows)
        self._schedule()
        try:
            return await request.future
        finally:
            self._accepted.discard(request)
            self._leave_queue(request)

    def _admit(self, rows: int, now: float, deadline: float) -> None:
        if self.state is not State.ACCEPTING:
            raise NotReady("The service is stopping.")
        if self.rows_waiting + rows > self.limits.queue_max_rows:
            raise Overloaded("Too many rows wait for the model.", retry_after=self.expected_wait())
        if now + self.expected_wait() > deadline:
            raise Overloaded(
                "The model would not get to this request in time.", retry_after=self.expected_wait()
            )

    def _leave_queue(self, request: _Request[RowT, OutcomeT]) -> None:
        queue = self._queues.get(request.group)
        if queue and request in queue:
            del queue[request]
            self.rows_waiting -= request.waiting
            if not queue:
                del self._queues[request.group]

    def _schedule(self) -> None:
        """Run a batch now, or later, or not yet."""
        if self._wake:
            self._wake.cancel()
            self._wake = None
        is_free = len(self._batches) < self.limits.slots
        if not is_free or not self.rows_waiting or self.state is State.STOPPED:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        oldest = min(next(iter(queue)).queued for queue in self._queues.values())
        fire_at = self._policy.fire_at(now, self.rows_waiting, oldest, self.cost)
        # To wait for a model that is busy is not to wait for other rows.
        forming_since = max(oldest, self._free_since)
        fire_at = min(fire_at, forming_since + self.limits.max_wait, self._nearest_deadline(now))
        if self.rows_waiting >= self.limits.max_rows or fire_at <= now:
            # In the next turn of the loop: what arrives in this one can still join.
            self._wake = loop.call_soon(self._start_batch)
        else:
            self._wake = loop.call_at(fire_at, self._start_batch)

    def _nearest_deadline(self, now: float) -> float:
        """When a batch has to begin at the latest for the heads of the queues to be in time."""
        nearest = min(next(iter(queue)).deadline for queue in self._queues.values())
        return max(now, nearest - 2 * self.cost(self.rows_waiting))

    def _start_batch(self) -> None:
        self._wake = None
        parts = self._bind(asyncio.get_running_loop().time())
        if parts:
            # In a context of its own, not in that of the request that happened to come last.
            batch = asyncio.create_task(self._run_batch(parts), context=Context())
            self._batches.add(batch)
            batch.add_done_callback(self._batches.discard)
        self._schedule()

    def _bind(self, now: float) -> list[_Part[RowT, OutcomeT]]:
        """Take up to `max_rows` rows of one shape from the queues, by priority and arrival."""
        parts: list[_Part[RowT, OutcomeT]] = []
        room = self.limits.max_rows
        shape_key: Hashable = None
        while room and self._queues:
            groups = [group for group in self._queues if not parts or group[1] == shape_key]
            if not groups:
                break
            group = min(
                groups, key=lambda group: (group[0], next(iter(self._queues[group])).number)
            )
            request = next(iter(self._queues[group]))
            if request.future.done() or request.deadline <= now:
                self._leave_queue(request)
                _fail(request, DeadlineExceeded("The request waited too long for the model."))
                continue
            shape_key = group[1]
            rows = request.rows[request.bound : request.bound + room]
            parts.append(_Part(request, request.bound, rows))
            request.bound += len(rows)
            self.rows_waiting -= len(rows)
            room -= len(rows)
            if not request.waiting:
                self._leave_queue(request)
        return parts

    async def _run_batch(self, parts: list[_Part[RowT, OutcomeT]]) -> None:
        try:
            await self._run_parts(parts)
        except Exception:
            # Not the model's fault but one in here; nobody may be left waiting.
            log.exception("the batch collector failed")
            for part in parts:
                _fail(part.request, PredictionFailed("The batch could not be run."))
        finally:
            self._free_since = asyncio.get_running_loop().time()
            self._policy.answered(self._free_since, sum(len(part.rows) for part in parts))
            # The slot is free before the next batch is bound.
            task = asyncio.current_task()
            if task:
                self._batches.discard(task)
            self._schedule()

    async def _run_parts(self, parts: list[_Part[RowT, OutcomeT]]) -> None:
        """Run a batch; if it fails, halve it until only the requests at fault fail."""
        pending = [parts]
        reruns = 0
        while pending:
            batch = [part for part in pending.pop() if not part.request.future.done()]
            if not batch:
                continue
            rows = [row for part in batch for row in part.rows]
            started = asyncio.get_running_loop().time()
            try:
                outcomes = await self._run(rows)
            except PredictionFailed as error:
                if len(batch) == 1 or reruns + 2 > MAX_RERUNS:
                    for part in batch:
                        _fail(part.request, PredictionFailed(error.detail), cause=error)
                else:
                    reruns += 2
                    middle = len(batch) // 2
                    pending += [batch[middle:], batch[:middle]]
            else:
                self.cost.ran(len(rows), asyncio.get_running_loop().time() - started)
                self._deliver(batch, outcomes)

    def _deliver(self, batch: list[_Part[RowT, OutcomeT]], outcomes: Sequence[OutcomeT]) -> None:
        each = iter(outcomes)
        for part in batch:
            request = part.request
            for number in range(part.first, part.first + len(part.rows)):
                request.outcomes[number] = next(each)
            if len(request.outcomes) == len(request.rows) and not request.future.done():
                in_order = [request.outcomes[number] for number in range(len(request.rows))]
                request.future.set_result(in_order)

    def drain(self) -> None:
        """Take no more requests; those that were taken are still answered."""
        if self.state is State.ACCEPTING:
            self.state = State.DRAINING

    def close(self) -> None:
        """Give up: fail what waits and what runs."""
        self.state = State.STOPPED
        if self._wake:
            self._wake.cancel()
        for request in list(self._accepted):
            _fail(request, NotReady("The service has stopped."))
        for batch in self._batches:
            batch.cancel()


def _fail(
    request: _Request[RowT, OutcomeT], error: Exception, cause: Exception | None = None
) -> None:
    """Each caller gets an exception object of its own, as raising one changes it."""
    error.__cause__ = cause
    if not request.future.done():
        request.future.set_exception(error)
