"""The one path that every protocol takes to a prediction."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import DeadlineExceeded, PredictionFailed
from app.predictor import BaseFeatures
from app.repository import Outcome, ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said: an outcome for each row, in order, and which version said it."""

    model: str
    version: str
    outcomes: Sequence[Outcome]


async def predict(model: ServedModel, rows: Sequence[BaseFeatures], deadline: float) -> Answer:
    """Score `rows`, which are valid features of `model`.

    Args:
        deadline: in seconds on the event loop's clock.

    Raises:
        ServiceError: the model is not ready, overloaded, failed, or late.
    """
    try:
        async with asyncio.timeout_at(deadline):
            outcomes = await model.predict(rows, deadline)
    except TimeoutError:
        raise DeadlineExceeded(f"Model {model.name} did not answer in time.") from None
    except PredictionFailed:
        # Logged here, where the log knows which request it was.
        log.exception("prediction failed", extra={"model": model.name})
        raise
    return Answer(model.name, model.version or "", outcomes)
