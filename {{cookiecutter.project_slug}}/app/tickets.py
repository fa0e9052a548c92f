"""What is agreed between those who have rows scored and the collector that does it.

Times are in seconds on the collector's clock, sizes in rows.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

OutcomeT = TypeVar("OutcomeT")
OutcomeT_contra = TypeVar("OutcomeT_contra", contravariant=True)


class Outlet(Protocol[OutcomeT_contra]):
    """Where what came out goes: an `asyncio.Future`, or something that acts like one.

    It gets either the outcomes, in order, or DeadlineExceeded, PredictionFailed or NotReady, or
    is cancelled; it is left alone when it is done. Who waits may go on within `set_result`.
    """

    def done(self) -> bool: ...

    def set_result(self, outcomes: Sequence[OutcomeT_contra], /) -> object: ...

    def set_exception(self, error: Exception, /) -> object: ...

    def cancel(self) -> object: ...


class BatchTrace(Protocol):
    """Follows a batch."""

    context: Context
    """Where the model is to be asked."""

    def end(self, rows: int, /, *, has_failed: bool) -> object: ...


class BatchTracer(Protocol):
    """Follows requests into batches."""

    def request(self) -> object:
        """Whatever is to be known of the request on whose behalf this is called."""

    def batch(self, requests: Sequence[Any], /) -> BatchTrace | None:
        """Of `requests`, as known, begins a batch."""


@dataclass(slots=True)
class BatchTimings:
    """Of a batch: shared by all whose rows are in it."""

    started: float
    rows: int
    seconds: float | None = None
    """What running it took, again where it had failed; None until it ran."""

    has_failed: bool = False
    trace: BatchTrace | None = None


@dataclass(slots=True)
class Timings:
    """How the rows of a request fared, for those who look on."""

    queued: float
    request: object = None
    """See `BatchTracer`."""

    batch: BatchTimings | None = None
    """The first with some of them, once it has begun."""


class Ticket(Protocol[OutcomeT]):
    """Of rows that were taken."""

    outlet: Outlet[OutcomeT]
    """May be replaced by another while it is not done."""

    def withdraw(self) -> None:
        """To be called by who does not wait any more, whether it has its answer or gives up."""

    def prolong(self, deadline: float) -> None:
        """Go on until `deadline`, if that is later than so far."""


class TimedTicket(Ticket[OutcomeT], Protocol[OutcomeT]):
    """Of rows that a model is asked for."""

    @property
    def timings(self) -> Timings:
        """Filled while the rows are scored."""


async def outcomes_of(
    enqueue: Callable[[Outlet[OutcomeT]], Ticket[OutcomeT]],
) -> Sequence[OutcomeT]:
    """What comes out for what `enqueue` has scored. Who is cancelled gives up its place."""
    answer: asyncio.Future[Sequence[OutcomeT]] = asyncio.get_running_loop().create_future()
    ticket = enqueue(answer)
    try:
        return await answer
    finally:
        ticket.withdraw()
        # An error knows this frame by its traceback; the frame must not know the error.
        del ticket, answer
