"""The one path that every protocol takes to a prediction."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from app import metrics
from app.cache import ResponseCache
from app.drift import ValueCounts
from app.errors import (
    DeadlineExceeded,
    NotReady,
    OutOfMemory,
    Overloaded,
    PredictionFailed,
    ServiceError,
)
from app.flights import Run
from app.predictor import BaseFeatures, ItemError
from app.repository import ServedModel
from app.runner import Outcome
from app.tickets import Outlet, Ticket, Timings

log = logging.getLogger(__name__)


CacheStatus = Literal["hit", "miss", "bypass"]

CacheUse = Literal["normal", "refresh", "none"]
"""What a caller allows the cache. `refresh`: the model is to be asked, and what it says may be
kept."""

OUTCOMES: Mapping[type[BaseException], metrics.Outcome] = {
    asyncio.CancelledError: "cancelled",
    DeadlineExceeded: "expired",
    Overloaded: "rejected",
    NotReady: "rejected",
    OutOfMemory: "out_of_memory",
}
"""How a request that raises such has ended; with all others it `failed`."""


@dataclass(slots=True)
class Answer:
    """What a model said, and which version said it."""

    version: str
    outcomes: Sequence[Outcome]
    """One for each row, in order."""

    errors: Mapping[int, ItemError]
    """Those of the outcomes that are no predictions, by the number of the row."""

    cache: CacheStatus | None
    """None: this model has no cache."""

    age_s: float | None
    """Of the oldest outcome, if all are from the cache."""

    content: bytes | None = None
    """The JSON of the only prediction, if the cache has made it; of a hit that is recalled by its
    body there are no outcomes then."""


def admit(model: ServedModel, deadline: float, priority: int) -> None:
    """Whether a request would be taken now, before anything is spent on it.

    Raises:
        NotReady, Overloaded: it would not.
    """
    try:
        model.admit(deadline, priority)
    except ServiceError as error:
        _count(model, error)
        raise


def no_room(model: ServedModel) -> Overloaded:
    """What to say to a request whose body would take too much, which is counted."""
    error = Overloaded("Too many bytes of requests wait for answers.", model.expected_wait())
    if model.metrics:
        model.metrics.rejected("queue_bytes")
    _count(model, error)
    return error


class Terms(Protocol):
    """What a caller asks for, beside the rows."""

    timings: Timings | None
    """Is set to that of those of the rows of which the model is asked."""

    @property
    def deadline(self) -> float:
        """By `time.monotonic`."""

    @property
    def priority(self) -> int:
        """The smaller one goes first."""

    @property
    def body(self) -> bytes | None:
        """What the rows are read from, if the cache may go by it."""

    @property
    def takes_one_row(self) -> bool:
        """Whether one row is read from `body`, as of each that is the same."""

    @property
    def is_alone(self) -> bool:
        """Whether no other request came with this one, so that it need not wait for any."""

    @property
    def use(self) -> CacheUse: ...


def _submit(
    model: ServedModel, terms: Terms, rows: Sequence[BaseFeatures], outlet: Outlet[Outcome]
) -> Ticket[Outcome]:
    ticket = model.submit(
        rows, terms.deadline, outlet, priority=terms.priority, is_alone=terms.is_alone
    )
    terms.timings = ticket.timings
    return ticket


def recall(model: ServedModel, key: bytes, terms: Terms) -> Answer | None:
    """What is known already of the row that a request's body holds, by its key in the cache: then
    the body need not be read."""
    cache, values = model.cache, model.values
    if cache is None or terms.use != "normal":
        return None
    if values and not values.may_skip:
        # It is to be seen what the row was.
        return None
    recalled = cache.recall(key)
    if recalled is None:
        return None
    if values:
        values.skip()
    if model.metrics:
        model.metrics.ended("ok")
    return Answer(model.version or "", (), {}, "hit", recalled.age_s, recalled.content)


async def predict(model: ServedModel, rows: Sequence[BaseFeatures], terms: Terms) -> Answer:
    """Score `rows`, which are valid features of `model`.

    Raises:
        ServiceError: the model is not ready, overloaded, failed, or late.
    """
    cache, use = model.cache, terms.use
    age_s = content = None
    body = terms.body if model.is_trivial else None
    try:
        if cache is None or use == "none":
            # As `outcomes_of`, which would be a coroutine more: 1 us.
            answer = model.outlet()
            ticket = _submit(model, terms, rows, answer)
            try:
                outcomes = await answer
            finally:
                ticket.withdraw()
                # An error knows this frame by its traceback; the frame must not know the error.
                del ticket, answer
        elif (key := cache.key_of_new(rows, body, refresh=use == "refresh")) is not None:
            answer = model.outlet()
            ticket = _submit(model, terms, rows, answer)
            run = Run((), answer, terms.deadline, ticket, body or b"")
            cache.lead(key, run, len(rows))
            outcomes = ()
            try:
                outcomes = await answer
            finally:
                content = cache.end(run, outcomes)
                del run, ticket, answer
        else:
            submit, refresh = partial(_submit, model, terms), use == "refresh"
            answered = await cache.answer(rows, submit, terms.deadline, refresh)
            outcomes, age_s, content = answered
    except (ServiceError, asyncio.CancelledError) as error:
        _count(model, error)
        if isinstance(error, PredictionFailed):
            # Logged here, where the log knows which request it was.
            log.exception("prediction failed", extra={"model": model.name})
        raise
    errors: dict[int, ItemError] = {}
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, ItemError):
            errors[row] = outcome  # noqa: PERF403  # A comprehension would be a call.
    if model.metrics:
        model.metrics.ended("invalid" if errors else "ok")
    if model.values:
        model.values.note(rows, outcomes)
    status: CacheStatus | None = None
    if cache:
        is_miss = age_s is None and use == "normal"
        status = "miss" if is_miss else _of_cache(cache, model.values, terms, rows)
    return Answer(model.version or "", outcomes, errors, status, age_s, content)


def _of_cache(
    cache: ResponseCache, values: ValueCounts | None, terms: Terms, rows: Sequence[BaseFeatures]
) -> CacheStatus:
    """Whether it had all, or was not to be asked."""
    if terms.use != "normal":
        cache.metrics.bypasses.inc()
        return "bypass"
    # The next time it may be known by the body alone.
    if terms.body is not None and terms.takes_one_row and (values is None or values.may_skip):
        cache.note_body(terms.body, rows[0])
    return "hit"


def _count(model: ServedModel, error: BaseException) -> None:
    if model.metrics:
        model.metrics.ended(OUTCOMES.get(type(error), "failed"))
