"""The batch collector: gathers the rows of many requests into batches for one model.

Late binding: which rows form a batch is decided when a slot of the model is free, never before.
Everything happens in event handlers on one event loop (a request comes or leaves, a batch ends, a
wait is over); there is no task that polls and none that could die unseen. Times are in seconds on
the loop's clock, sizes in rows.
"""

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import chain
from math import inf
from time import monotonic
from typing import Generic

from app.deadlines import Deadlines
from app.errors import (
    DeadlineExceeded,
    NotReady,
    OutOfMemory,
    Overloaded,
    PredictionFailed,
)
from app.jobs import PromptFuture
from app.metrics import ModelMetrics
from app.queues import ANY, Group, OutcomeT, Part, Parts, Queues, Request, RowT
from app.tickets import BatchTimings, BatchTrace, BatchTracer, Outlet, TimedTicket, Timings
from app.waiting import MEMORY, WORTH_A_WAIT_S, WaitPolicy

log = logging.getLogger(__name__)

MAX_RERUNS = 64
"""Runs that may be spent on finding the requests that make a batch fail, or that fit in memory:
enough for whichever of thirty-two, or for any four of five hundred. Of a model that always fails it
is asked twice for each of thirty-two requests."""


BURST = 1.5
"""A turn of the event loop that multiplies the rows that wait by this is part of a burst, such as
of callers that were answered together. With less, arrivals at random would put a batch off."""

CAUTION = 1.25
"""A request has to have time for so many times the wait that is expected, which is a mean. Under
overload all who are taken wait for as long as they can; of those who had just enough time one in
five came too late (docs/performance.md of the template)."""


class State(StrEnum):
    ACCEPTING = "accepting"
    DRAINING = "draining"
    STOPPED = "stopped"


ACCEPTING = State.ACCEPTING
"""What belongs to an Enum takes 0.1 us to look up in CPython 3.11, ten times as long as this."""


@dataclass
class Limits:
    """Of one collector. `max_wait` bounds what a wait policy asks for, once a slot is free."""

    max_rows: int
    queue_max_rows: int
    max_wait: float
    slots: int = 1
    allowed_sizes: Sequence[int] = ()
    """Where not empty: what a batch is padded to, smallest first; `max_rows` is one of them."""

    def padded(self, rows: int) -> int:
        """The number of rows that the model is given for `rows`."""
        return next((size for size in self.allowed_sizes if size >= rows), rows)

    def smaller(self, rows: int) -> int:
        """The most rows to try after `rows` were too many: half, if allowed; 0: none are."""
        if not self.allowed_sizes:
            return rows // 2
        return max((size for size in self.allowed_sizes if size < self.padded(rows)), default=0)


@dataclass(eq=False)
class _Request(Request[RowT, OutcomeT]):
    """What its caller has to do with it; see `Ticket`."""

    collector: "Collector[RowT, OutcomeT]"

    def withdraw(self) -> None:
        self.collector.withdraw(self)

    def prolong(self, deadline: float) -> None:
        self.collector.prolong(self, deadline)


@dataclass(eq=False, slots=True)
class _Batch(Generic[RowT, OutcomeT]):
    """What holds a slot: the parts that were bound together, and those of them still to be run."""

    parts: Parts[RowT, OutcomeT]
    to_run: list[Parts[RowT, OutcomeT]]
    timings: BatchTimings
    runs: list[tuple[int, float]] = field(default_factory=list)
    """Those that worked: rows and seconds."""

    reruns: int = 0
    too_large: int = 0
    """Rows of the run that first was out of memory."""

    has_huge_row: bool = False
    """Whether one was out of memory that cannot be made smaller."""


class Collector(Generic[RowT, OutcomeT]):
    """Runs `run` on batches of at most `limits.max_rows`, in `limits.slots` batches at a time.

    `run` gets a list of rows and gives a future, which may be done already: of one outcome for
    each row, in order, or of the error PredictionFailed. Each accepted request is answered
    exactly once: with its outcomes, or with an error that no other request shares.
    """

    def __init__(
        self,
        run: Callable[[list[RowT]], asyncio.Future[Sequence[OutcomeT]]],
        limits: Limits,
        policy: WaitPolicy,
        metrics: ModelMetrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.state: State = ACCEPTING
        self.limits = limits
        self.cost = policy.cost
        self.tracer: BatchTracer | None = None
        self._run = run
        self._policy = policy
        self._metrics = metrics
        # Not the loop's time: uvloop's counts milliseconds.
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._context = Context()
        """For what is not done on behalf of the request that happened to come last."""

        self._queues: Queues[RowT, OutcomeT] = Queues(self._expire)
        self._accepted: Deadlines[Request[RowT, OutcomeT]] = Deadlines(self._expire, clock)
        self._batches: set[_Batch[RowT, OutcomeT]] = set()
        self._wake: asyncio.Handle | None = None
        self._wakes_at = 0.0
        self._is_due = False
        """Whether `_wake` is for the next turn of the loop."""

        self._enough = 0.0
        """Rows that are a reason to look at what waits before `_wake` does."""

        self._count = 0
        self._free_since = 0.0
        """When there was a slot again, after all had been taken."""

        self._started = 0.0
        self._is_backlogged = False
        """Whether the last batch left behind enough rows for another."""

        self._turnaround = 0.0
        """Smoothed time from one batch to the next with a backlog: what a batch costs, and what
        is done in between. Zero without one."""

    @property
    def rows_waiting(self) -> int:
        return self._queues.rows

    @property
    def is_idle(self) -> bool:
        return not self._batches and not self._queues.rows

    @property
    def _has_free_slot(self) -> bool:
        return len(self._batches) < self.limits.slots

    def expected_wait(self, priority: float = inf, shape_key: Hashable = ANY) -> float:
        """About how long a request that came now would wait until its batch begins."""
        most, slots, running = self.limits.max_rows, self.limits.slots, len(self._batches)
        before, rows = self._queues.batches_before(priority, shape_key, most)
        batches = running + before
        if not batches:
            return 0.0
        # Where shapes differ, batches are not full.
        cost, full_cost = self.cost((running * most + rows) / batches), self.cost(most)
        turnaround = self._turnaround * cost / full_cost if full_cost else self._turnaround
        return max((batches // slots) * cost, batches * turnaround)

    def _own_cost(self, rows: int) -> float:
        """What it takes to run `rows` alone, in as many batches as they are, at the least."""
        most = self.limits.max_rows
        if rows <= most:
            return self.cost(rows)
        before = (rows - 1) // most
        rounds, beside = divmod(before, self.limits.slots)
        return rounds * self.cost(most) + self.cost(most if beside else rows - before * most)

    def admit(
        self, rows: int, deadline: float, priority: float = inf, shape_key: Hashable = ANY
    ) -> None:
        """Whether `rows` would be taken now.

        Raises:
            NotReady: no more requests are taken.
            Overloaded: there is no room for `rows`, or the deadline would pass in the queue.
        """
        if self.state is not ACCEPTING:
            self._metrics.rejected("not_ready")
            raise NotReady("The service is stopping.")
        if self._queues.rows + rows > self.limits.queue_max_rows:
            self._metrics.rejected("queue_full")
            raise Overloaded("Too many rows wait for the model.", self.expected_wait())
        # An idle model is always asked: what is known of its cost may have been a fluke.
        if self._batches:
            wait = self.expected_wait(priority, shape_key)
            if self._clock() + CAUTION * wait + self._own_cost(rows) > deadline:
                self._metrics.rejected("deadline")
                raise Overloaded("The model would not get to this request in time.", wait)

    def outlet(self) -> asyncio.Future[Sequence[OutcomeT]]:
        """To `enqueue` with, and to wait for."""
        return PromptFuture(loop=self._loop)

    def enqueue(
        self,
        rows: Sequence[RowT],
        deadline: float,
        outlet: Outlet[OutcomeT],
        *,
        group: Group = (0, None),
        is_alone: bool = False,
    ) -> TimedTicket[OutcomeT]:
        """Have `rows` scored; what comes out goes to `outlet`, which may be at once.

        `is_alone` says that no other request comes in this turn of the event loop, so that there
        is no need to wait for the next one.

        Raises:
            NotReady, Overloaded: see `admit`.
        """
        self.admit(len(rows), deadline, *group)
        now = self._clock()
        self._count += 1
        timings = Timings(now, self.tracer.request() if self.tracer else None)
        request = _Request(rows, deadline, group, self._count, outlet, timings, len(rows), self)
        is_idle = self.is_idle
        if is_idle:
            self._policy.found_idle(now)
        self._policy.arrived(now, len(rows))
        if is_alone and is_idle and self._may_start_at_once(request):
            # Through the queue it would take half as long again as a small model does.
            request.waiting = 0
            self._start([Part(request, 0, rows)], now)
            if not outlet.done():
                self._accepted.add(request, deadline)
        else:
            is_first_to_expire = deadline < self._accepted.earliest
            self._accepted.add(request, deadline)
            self._queues.add(request)
            if self._batches:
                self._metrics.waiting(self._queues.rows)
            if self._queues.rows >= self.limits.max_rows and self._may_start_full():
                # Not on behalf of this one alone.
                Context().run(self._start_batch)
            elif not self._wake or self._queues.rows >= self._enough or is_first_to_expire:
                self._schedule()
        return request

    def withdraw(self, request: Request[RowT, OutcomeT]) -> None:
        """See `Ticket`."""
        self._accepted.discard(request)
        if request.waiting:
            self._leave_queue(request)
        request.outlet.cancel()

    def prolong(self, request: Request[RowT, OutcomeT], deadline: float) -> None:
        """See `Ticket`."""
        if deadline > request.deadline and not request.outlet.done():
            request.deadline = deadline
            self._accepted.add(request, deadline)

    def _expire(self, request: Request[RowT, OutcomeT]) -> None:
        if request.waiting:
            self._leave_queue(request)
        _fail(request, DeadlineExceeded("The model did not answer in time."))

    def _leave_queue(self, request: Request[RowT, OutcomeT]) -> None:
        if self._queues.remove(request):
            self._metrics.waiting(self._queues.rows)
            if not self._queues.rows and not self._is_due:
                # It was set for who has gone.
                self._cancel_wake()

    def _may_start_at_once(self, request: Request[RowT, OutcomeT]) -> bool:
        now, rows = request.timings.queued, len(request.rows)
        room = self.limits.max_rows - rows
        # A start that is due for one who has gone would start another batch beside this one.
        is_free = room >= 0 and not self._is_due and now < request.deadline
        return is_free and self._policy.plan(now, rows, room, now)[0] <= now

    def _may_start_full(self) -> bool:
        # Of what still comes in this turn of the loop, only something more urgent would be in the
        # batch. With a model that takes longer, the turn would last for too long.
        is_quick = self.cost(self.limits.max_rows) < WORTH_A_WAIT_S
        return is_quick and self._queues.are_one and self._has_free_slot

    def _schedule(self) -> None:
        """Run a batch now, or later, or not yet."""
        if self._is_due or not self._has_free_slot:
            return
        if not self._queues.rows or self.state is State.STOPPED:
            self._cancel_wake()
            return
        now = self._clock()
        oldest = self._queues.oldest
        room = self.limits.max_rows - self._queues.rows
        fire_at, enough = self._policy.plan(now, self._queues.rows, room, oldest)
        self._enough = min(enough, self.limits.max_rows)
        # To wait for a model that is busy is not to wait for other rows.
        forming_since = max(oldest, self._free_since)
        # Of a deadline that is met already it takes no notice until that has passed. Then a batch
        # or two were smaller than they could be. Until there are enough it is not asked again.
        in_time = self._accepted.earliest - self.cost(self._queues.rows) - self.cost(self._enough)
        fire_at = min(fire_at, forming_since + self.limits.max_wait, in_time)
        if room > 0 and fire_at > now:
            if not self._wake or fire_at != self._wakes_at:
                self._cancel_wake()
                self._wakes_at = fire_at
                self._metrics.waiting(self._queues.rows)
                self._wake = self._loop.call_at(fire_at, self._look_again, context=self._context)
        else:
            self._cancel_wake()
            # In the next turn of the loop: what arrives in this one can still join.
            self._is_due, self._enough = True, inf
            start = partial(self._start_when_settled, self._queues.rows)
            self._wake = self._loop.call_soon(start, context=self._context)

    def _cancel_wake(self) -> None:
        if self._wake:
            self._wake.cancel()
            self._wake = None

    def _look_again(self) -> None:
        """Whoever came while the event loop was busy with something else is heard first."""
        self._wake = self._loop.call_soon(self._reconsider, context=self._context)

    def _reconsider(self) -> None:
        self._wake = None
        self._schedule()

    def _start_when_settled(self, rows_before: int) -> None:
        """Start a batch, unless this turn of the loop brought many more rows: so may the next."""
        if BURST * rows_before <= self._queues.rows < self.limits.max_rows:
            start = partial(self._start_when_settled, self._queues.rows)
            self._wake = self._loop.call_soon(start, context=self._context)
        else:
            self._start_batch()

    def _start_batch(self) -> None:
        self._cancel_wake()
        self._is_due = False
        now = self._clock()
        parts = self._queues.take(self.limits.max_rows, now)
        self._metrics.waiting(self._queues.rows)
        if parts:
            self._start(parts, now)
        else:
            self._is_backlogged = False
        self._schedule()

    def _start(self, parts: Parts[RowT, OutcomeT], now: float) -> None:
        timings, waits = BatchTimings(now, 0), []
        for request, first, its_rows in parts:
            timings.rows += len(its_rows)
            if not first:
                request.timings.batch = timings
                waits.append(now - request.timings.queued)
        self._metrics.began(waits)
        if self.tracer:
            timings.trace = self.tracer.batch([part.request.timings.request for part in parts])
        self._note_turnaround(now)
        batch = _Batch(parts, [parts], timings)
        self._batches.add(batch)
        self._run_next(batch)

    def _note_turnaround(self, now: float) -> None:
        seconds = now - self._started
        if self._is_backlogged:
            before = self._turnaround or seconds
            self._turnaround = MEMORY * before + (1 - MEMORY) * seconds
        else:
            self._turnaround = 0.0
        self._started = now
        self._is_backlogged = self._queues.rows >= self.limits.max_rows

    def _run_next(self, batch: _Batch[RowT, OutcomeT]) -> None:
        """Run what is left to run of `batch`, and free its slot when that is nothing."""
        while batch.to_run:
            parts = [part for part in batch.to_run.pop() if not part.request.outlet.done()]
            if not parts:
                continue
            started = self._clock()
            rows = [row for _, _, its_rows in parts for row in its_rows]
            # What comes out for the copies is not delivered to anybody.
            rows += rows[:1] * (self.limits.padded(len(rows)) - len(rows))
            run = self._run_of(rows, batch.timings.trace)
            if not run.done():
                resume = partial(self._resume, batch, parts, started)
                run.add_done_callback(resume, context=self._context)
                return
            self._ended(batch, parts, started, run)
            # Its error knows what the model had at hand, which is not to outlast the next run.
            del run
        if len(batch.parts) == 1 and not self._queues.rows:
            # The answer goes first, as nothing waits for the slot.
            self._loop.call_soon(self._free, batch, context=self._context)
        else:
            self._free(batch)

    def _run_of(
        self, rows: list[RowT], trace: BatchTrace | None
    ) -> asyncio.Future[Sequence[OutcomeT]]:
        try:
            return trace.context.run(self._run, rows) if trace else self._run(rows)
        except Exception as error:
            # Or the slot would never be free again.
            failed: asyncio.Future[Sequence[OutcomeT]] = self._loop.create_future()
            failed.set_exception(error)
            try:
                return failed
            finally:
                # The error knows this frame, which is not to know the error.
                del failed

    def _resume(
        self,
        batch: _Batch[RowT, OutcomeT],
        parts: Parts[RowT, OutcomeT],
        started: float,
        run: asyncio.Future[Sequence[OutcomeT]],
    ) -> None:
        self._ended(batch, parts, started, run)
        self._run_next(batch)

    def _free(self, batch: _Batch[RowT, OutcomeT]) -> None:
        for rows, seconds in batch.runs:
            self.cost.ran(rows, seconds)
        # One that was begun before they were made smaller says nothing of those; nor does one in
        # which a row was too large by itself.
        if not batch.has_huge_row and 0 < batch.too_large <= self.limits.max_rows:
            self._allow_fewer()
        now = self._clock()
        if not self._has_free_slot:
            self._free_since = now
        self._policy.answered(now, batch.timings.rows)
        # The slot is free before the next batch is bound.
        self._batches.discard(batch)
        if self.is_idle:
            self._is_backlogged = False
        self._metrics.waiting(self._queues.rows)
        self._schedule()
        # Last: should it raise, the slot is free all the same.
        if batch.timings.trace:
            batch.timings.trace.end(batch.timings.rows, has_failed=batch.timings.has_failed)

    def _ended(
        self,
        batch: _Batch[RowT, OutcomeT],
        parts: Parts[RowT, OutcomeT],
        started: float,
        run: asyncio.Future[Sequence[OutcomeT]],
    ) -> None:
        """Deliver what the model gave for `parts`; if it failed, see what can be run again."""
        rows = sum([len(its_rows) for _, _, its_rows in parts])
        seconds = self._clock() - started
        self._metrics.ran(rows, seconds)
        batch.timings.seconds = (batch.timings.seconds or 0) + seconds
        # Raised here, the error would know this frame, which knows those who get the error.
        error = asyncio.CancelledError() if run.cancelled() else run.exception()
        batch.timings.has_failed |= error is not None
        if error is None:
            self._deliver(parts, run.result())
            batch.runs.append((rows, seconds))
        elif isinstance(error, OutOfMemory):
            self._shrink(batch, parts, rows, error)
        elif isinstance(error, PredictionFailed):
            self._bisect(batch, parts, error)
        else:
            # Not the model's fault but one in here; nobody may be left waiting.
            log.error("the batch collector failed", exc_info=error)
            for part in parts:
                _fail(part.request, PredictionFailed("The batch could not be run."))

    def _bisect(
        self,
        batch: _Batch[RowT, OutcomeT],
        parts: Parts[RowT, OutcomeT],
        error: PredictionFailed,
    ) -> None:
        """Run the halves of a failed batch, until only the requests at fault fail."""
        if len(parts) == 1 or batch.reruns + 2 > MAX_RERUNS:
            for part in parts:
                _fail(part.request, type(error)(error.detail), cause=error)
            return
        batch.reruns += 2
        self._metrics.reruns.inc(2)
        middle = len(parts) // 2
        batch.to_run += [parts[middle:], parts[:middle]]

    def _shrink(
        self,
        batch: _Batch[RowT, OutcomeT],
        parts: Parts[RowT, OutcomeT],
        rows: int,
        error: OutOfMemory,
    ) -> None:
        """Run these in halves, until only the requests fail that are too large by themselves."""
        batch.too_large = batch.too_large or rows
        most = self.limits.smaller(rows)
        if not most:
            batch.has_huge_row = True
            self._bisect(batch, parts, error)
            return
        halves = _in_chunks(parts, most)
        if batch.reruns + len(halves) > MAX_RERUNS:
            for part in parts:
                _fail(part.request, type(error)(error.detail), cause=error)
            return
        batch.reruns += len(halves)
        self._metrics.reruns.inc(len(halves))
        batch.to_run += reversed(halves)

    def _allow_fewer(self) -> None:
        """Half as many rows from now on."""
        fewer = self.limits.smaller(self.limits.max_rows)
        self.limits.max_rows = fewer
        self._metrics.max_rows.set(fewer)
        log.warning("the model ran out of memory; batches have at most %d rows now", fewer)

    def _deliver(self, parts: Parts[RowT, OutcomeT], outcomes: Sequence[OutcomeT]) -> None:
        end = 0
        for request, first, rows in parts:
            begin, end = end, end + len(rows)
            if request.outlet.done():
                continue
            if len(rows) == len(request.rows):
                _answer(request, outcomes[begin:end])
                continue
            request.outcomes = request.outcomes or {}
            request.outcomes[first] = outcomes[begin:end]
            request.answered += len(rows)
            if request.answered == len(request.rows):
                in_order = (request.outcomes[first] for first in sorted(request.outcomes))
                _answer(request, list(chain.from_iterable(in_order)))

    def drain(self) -> None:
        """Take no more requests; those that were taken are still answered."""
        if self.state is ACCEPTING:
            self.state = State.DRAINING

    def close(self, reason: str = "The service has stopped.") -> None:
        """Give up: fail what waits and what runs."""
        self.state = State.STOPPED
        self._cancel_wake()
        self._is_due = False
        for request in self._accepted.items():
            _fail(request, NotReady(reason))


def _in_chunks(parts: Parts[RowT, OutcomeT], max_rows: int) -> list[Parts[RowT, OutcomeT]]:
    """`parts` in the same order, in lists of at most `max_rows` rows."""
    chunks: list[Parts[RowT, OutcomeT]] = [[]]
    room = max_rows
    for part in parts:
        begin = 0
        while begin < len(part.rows):
            if not room:
                chunks.append([])
                room = max_rows
            rows = part.rows[begin : begin + room]
            chunks[-1].append(Part(part.request, part.first + begin, rows))
            begin += len(rows)
            room -= len(rows)
    return chunks


def _answer(request: Request[RowT, OutcomeT], outcomes: Sequence[OutcomeT]) -> None:
    try:
        request.outlet.set_result(outcomes)
    except Exception as error:
        # Not those behind it are to pay for it, nor the batch's slot to be lost.
        log.exception("an answer could not be delivered")
        _fail(request, PredictionFailed("The answer could not be delivered."), cause=error)


def _fail(
    request: Request[RowT, OutcomeT], error: Exception, cause: Exception | None = None
) -> None:
    """Each caller gets an exception object of its own, as raising one changes it."""
    error.__cause__ = cause
    if not request.outlet.done():
        request.outlet.set_exception(error)
