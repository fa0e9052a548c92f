"""The one path that every protocol takes to a prediction."""

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

from app.errors import DeadlineExceeded, NotReady, Overloaded, PredictionFailed, ServiceError
from app.metrics import Outcome
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.repository import ServedModel

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a model said, and which version said it."""

    version: str
    outcomes: Sequence[BasePrediction | ItemError]
    """One for each row, in order."""

    errors: dict[int, ItemError]
    """Those of the outcomes that are no predictions, by the number of the row."""


def admit(model: ServedModel, deadline: float) -> None:
    """Whether a request would be taken now, before anything is spent on it.

    Raises:
        NotReady, Overloaded: it would not.
    """
    try:
        model.admit(deadline)
    except ServiceError as error:
        _count(model, error)
        raise


async def predict(
    model: ServedModel,
    rows: Sequence[BaseFeatures],
    deadline: float,
    *,
    priority: int = 0,
    is_alone: bool = False,
) -> Answer:
    """Score `rows`, which are valid features of `model`.

    Args:
        deadline: by `time.monotonic`.
        priority: the smaller one goes first.
        is_alone: no other request came with this one, so it need not wait for any.

    Raises:
        ServiceError: the model is not ready, overloaded, failed, or late.
    """
    try:
        outcomes = await model.predict(rows, deadline, priority=priority, is_alone=is_alone)
    except (ServiceError, asyncio.CancelledError) as error:
        _count(model, error)
        if isinstance(error, PredictionFailed):
            # Logged here, where the log knows which request it was.
            log.exception("prediction failed", extra={"model": model.name})
        raise
    errors = {row: item for row, item in enumerate(outcomes) if isinstance(item, ItemError)}
    if model.metrics:
        model.metrics.ended("invalid" if errors else "ok")
    return Answer(model.version or "", outcomes, errors)


def _count(model: ServedModel, error: BaseException) -> None:
    outcomes: dict[type[BaseException], Outcome] = {
        asyncio.CancelledError: "cancelled",
        DeadlineExceeded: "expired",
        Overloaded: "rejected",
        NotReady: "rejected",
    }
    if model.metrics:
        model.metrics.ended(outcomes.get(type(error), "failed"))
