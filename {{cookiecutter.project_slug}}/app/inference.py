"""The one path that every protocol takes to a prediction."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import DeadlineExceeded, NotReady, Overloaded, PredictionFailed, ServiceError
from app.metrics import Outcome
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.repository import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said: an outcome for each row, in order, and which version said it."""

    model: str
    version: str
    outcomes: Sequence[BasePrediction | ItemError]


def admit(model: ServedModel, deadline: float) -> None:
    """Refuse early what would be refused anyway, before anything is spent on the request.

    Raises:
        ServiceError: the model is not ready, or overloaded.
    """
    try:
        model.admit(deadline)
    except ServiceError as error:
        _count(model, error)
        raise


async def predict(
    model: ServedModel, rows: Sequence[BaseFeatures], deadline: float, priority: int = 0
) -> Answer:
    """Score `rows`, which are valid features of `model`.

    Args:
        deadline: in seconds on the event loop's clock.
        priority: the smaller one goes first.

    Raises:
        ServiceError: the model is not ready, overloaded, failed, or late.
    """
    try:
        outcomes = await model.predict(rows, deadline, priority)
    except (ServiceError, asyncio.CancelledError) as error:
        _count(model, error)
        if isinstance(error, PredictionFailed):
            # Logged here, where the log knows which request it was.
            log.exception("prediction failed", extra={"model": model.name})
        raise
    if model.metrics:
        refused = any(isinstance(outcome, ItemError) for outcome in outcomes)
        model.metrics.ended("invalid" if refused else "ok")
    return Answer(model.name, model.version or "", outcomes)


def _count(model: ServedModel, error: BaseException) -> None:
    outcomes: dict[type[BaseException], Outcome] = {
        asyncio.CancelledError: "cancelled",
        DeadlineExceeded: "expired",
        Overloaded: "rejected",
        NotReady: "rejected",
    }
    if model.metrics:
        model.metrics.ended(outcomes.get(type(error), "failed"))
