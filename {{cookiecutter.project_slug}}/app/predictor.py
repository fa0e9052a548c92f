"""The contract between the service and a model: what a file in predictors/ implements.

A predictor is plain, synchronous Python. It never sees HTTP, caching or asyncio, so the
same file answers requests here and scores files in a notebook.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict

Device = Literal["auto", "cpu", "cuda"]
Provider = Literal["cpu", "cuda"]


class BaseFeatures(BaseModel):  # noqa: PLW1641 - pydantic makes the hash of a frozen model
    """One row of input; subclass it as `Features`.

    Validation is strict: a string is not a number, true is not 1, NaN and infinity are
    refused, and a field that the model does not know is an error instead of being ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; arrays are if all of their numbers are."""
        if type(other) is not type(self):
            return NotImplemented
        fields = zip(self.__dict__.values(), other.__dict__.values(), strict=True)
        return all(_are_equal(mine, theirs) for mine, theirs in fields)


def _are_equal(mine: Any, theirs: Any) -> bool:
    equal = mine == theirs
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


class BasePrediction(BaseModel):
    """One row of output; subclass it as `Prediction`. NumPy scalars are accepted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


@dataclass(frozen=True, slots=True)
class ItemError:
    """Says that one row cannot be scored, without failing the rows beside it.

    `reason` is shown to the caller; `field` names the feature at fault, where there is one.
    """

    reason: str
    field: str = ""


FeaturesT = TypeVar("FeaturesT", bound=BaseFeatures)
PredictionT = TypeVar("PredictionT", bound=BasePrediction)


class BasePredictor(ABC, Generic[FeaturesT, PredictionT]):
    """One model; subclass it as `class Predictor(BasePredictor[Features, Prediction])`.

    Calls of `predict` never overlap, so it needs no lock. They come from a thread that belongs to
    this model, or from the event loop if batches take less than 3 ms on a CPU.
    """

    features: ClassVar[type[BaseFeatures]]
    prediction: ClassVar[type[BasePrediction]]

    example: ClassVar[BaseFeatures]
    """A valid row. It serves the API docs, the warm-up, the readiness check and the tests."""

    batch_max_rows: ClassVar[int | None] = None
    """Most rows in one call of `predict`, where the setting BATCH_MAX_ROWS does not suit."""

    queue_max_rows: ClassVar[int | None] = None
    """Most rows that wait for this model, where the setting QUEUE_MAX_ROWS does not suit."""

    allowed_batch_sizes: ClassVar[tuple[int, ...]] = ()
    """The only numbers of rows in one call, smallest first, for a model with fixed shapes: a
    smaller batch is filled up with copies of a row. All are run at start-up. Empty: any number."""

    instances: ClassVar[int] = 1
    """How often the model is loaded, each time on a thread of its own, to run batches at once."""

    runs_inline: ClassVar[bool | None] = None
    """Whether `predict` runs on the event loop, which it holds up. None: once it is measured to
    be quick. False for one that is sometimes slow, as when it asks another service."""

    cache: ClassVar[bool] = True
    """Whether an answer may be given again for an equal row. False for a model that draws lots,
    asks other services, or knows the time."""

    cache_ttl_s: ClassVar[float | None] = None
    """For how long, in seconds, where the setting CACHE_TTL_S does not suit."""

    cache_lock_s: ClassVar[float] = 0
    """For a model that takes longer than Redis by far: about as many seconds as it may take. Of
    all processes that share a Redis, one scores an equal row, and the others wait for it so long.
    0: each does."""

    provider: Provider = "cpu"
    """What the model computes on; `load` sets it to "cuda" where that is so."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin, types = get_origin(base), get_args(base)
            is_predictor = isinstance(origin, type) and issubclass(origin, BasePredictor)
            if is_predictor and not any(isinstance(type_, TypeVar) for type_ in types):
                cls.features, cls.prediction = types

    @abstractmethod
    def load(self, artifact_dir: Path, device: Device) -> None:
        """Read the model from `artifact_dir`, whose files have been checked by digest.

        Called once, before `predict`. Raise anything to stop the start-up.
        """

    @abstractmethod
    def predict(self, batch: list[FeaturesT]) -> Sequence[PredictionT | ItemError]:
        """Score `batch`; the answer has the same length and order.

        The rows can be from several requests. An exception fails the request whose row causes
        it with status 500, after the others were run again without it; an `ItemError` in place
        of a prediction answers 422, names the row, and spares the others that.
        """

    def shape_key(self, row: FeaturesT) -> Hashable:
        """What rows must have in common to share a batch, such as a size or a range of lengths.

        Called on the event loop for each row: keep it quick, and the number of shapes small, as all
        that wait are looked at for each request. By default any rows go together.
        """
        return None


class PipelinedPredictor(BasePredictor[FeaturesT, PredictionT]):
    """A predictor in two steps: the next batch is prepared while the device computes this one.

    Worth it where both take long, and the second releases the interpreter's lock.
    """

    @abstractmethod
    def prepare(self, batch: list[FeaturesT]) -> Any:
        """Turn `batch` into the model's input, on a thread that does only this."""

    @abstractmethod
    def compute(self, prepared: Any) -> Sequence[PredictionT | ItemError]:
        """Score what `prepare` gave, like `predict`: an outcome for each row, in order."""

    def predict(self, batch: list[FeaturesT]) -> Sequence[PredictionT | ItemError]:
        return self.compute(self.prepare(batch))
