"""What values a model was trained on and gives: the reference that drift is measured against.

It lies beside the model's files as `reference.json`, and the manifest vouches for it like for
them. Values are in bins: numbers in about ten that are equally full, by the deciles of the sample;
yes or no, and words of which there are few, in one for each.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from statistics import quantiles
from typing import Any, Self

from pydantic import BaseModel, Field

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, ItemError

REFERENCE = "reference.json"

MAX_FIELDS = 50
"""Each field is some twenty time series, whose number has to have a bound."""

MAX_WORDS = 20
MAX_CHARS = 60
BINS = 10
BATCH_ROWS = 32

NONE = "none"
OTHER = "other"
LAST = "+Inf"


class FieldReference(BaseModel):
    """The values of one field in the sample."""

    edges: list[float] | None = Field(default=None, max_length=BINS)
    """The largest number of each bin, in order; above the last is one more. None: words."""

    shares: dict[str, float] = Field(max_length=MAX_WORDS + 2)
    """The part of the sample that is in a bin, by its name."""

    def bin_of(self, value: Any) -> str:
        """The name of the bin of a value, whatever it is."""
        if value is None:
            return NONE
        if self.edges is not None:
            is_number = isinstance(value, int | float)
            at = bisect_left(self.edges, value) if is_number else len(self.edges)
            return name_of(self.edges[at]) if at < len(self.edges) else LAST
        name = _word(value)
        return name if name in self.shares else OTHER


class Reference(BaseModel):
    """The fields of `Features` and `Prediction` that have bins, and how full these were."""

    rows: int
    features: dict[str, FieldReference] = Field(max_length=MAX_FIELDS)
    prediction: dict[str, FieldReference] = Field(max_length=MAX_FIELDS)

    def of(self, features: type[BaseModel], prediction: type[BaseModel]) -> Self:
        """What of it is known of these, which may have changed since."""
        known = {name: self.features[name] for name in features.model_fields & self.features.keys()}
        given = {
            name: self.prediction[name] for name in prediction.model_fields & self.prediction.keys()
        }
        return self.model_copy(update={"features": known, "prediction": given})


def describe(
    directory: Path, predictor_class: type[BasePredictor[Any, Any]], sample: Sequence[BaseFeatures]
) -> None:
    """Ask the model in `directory` for `sample`, and write down the values of both beside it.

    For use in `new_version`, when the model's files are written. The sample should be like what
    callers will send, a thousand rows or more; those that cannot be scored are left out. Fields
    that are neither numbers nor one of at most 20 words, and those past the fiftieth, have no
    bins.
    """
    predictor = predictor_class()
    predictor.load(directory, "auto")
    scored = list(_scored(predictor, sample))
    reference = Reference(
        rows=len(scored),
        features=_fields([features for features, _ in scored]),
        prediction=_fields([prediction for _, prediction in scored]),
    )
    content = reference.model_dump_json(indent=2, exclude_none=True)
    (directory / REFERENCE).write_text(content + "\n", encoding="utf-8")


def _scored(
    predictor: BasePredictor[Any, Any], sample: Sequence[BaseFeatures]
) -> Iterator[tuple[BaseFeatures, BasePrediction]]:
    sizes = predictor.allowed_batch_sizes
    size = sizes[-1] if sizes else predictor.batch_max_rows or BATCH_ROWS
    for first in range(0, len(sample), size):
        rows = list(sample[first : first + size])
        filling = rows[:1] * (size - len(rows)) if sizes else []
        outcomes = predictor.predict(rows + filling)
        for row, outcome in zip(rows, outcomes, strict=False):
            if not isinstance(outcome, ItemError):
                yield row, outcome


def _fields(rows: Sequence[BaseModel]) -> dict[str, FieldReference]:
    fields: dict[str, FieldReference] = {}
    for name in type(rows[0]).model_fields if rows else ():
        if len(fields) < MAX_FIELDS and (field := _field([getattr(row, name) for row in rows])):
            fields[name] = field
    return fields


def _field(values: Sequence[Any]) -> FieldReference | None:
    """None: they are not of a kind that has bins."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        edges = _edges(present)
        bins = [*map(name_of, edges), LAST]
        field = FieldReference(edges=edges, shares=dict.fromkeys(bins, 0.0))
    elif all(isinstance(value, bool | str | Enum) for value in present):
        bins = sorted(set(map(_word, present)))
        if len(bins) > MAX_WORDS:
            return None
        field = FieldReference(shares=dict.fromkeys([*bins, OTHER], 0.0))
    else:
        return None
    counts = Counter(map(field.bin_of, values))
    shares = {**field.shares, **_shares(counts, len(values))}
    return field.model_copy(update={"shares": shares})


def _edges(numbers: Sequence[float]) -> list[float]:
    different = sorted(set(numbers))
    # Of a few, such as classes, each has a bin; the largest one shares it with what is above.
    few = different[:-1] or different
    cuts = few if len(different) <= BINS else quantiles(numbers, n=BINS, method="inclusive")
    return sorted({float(name_of(cut)) for cut in cuts})


def _shares(counts: Mapping[str, int], rows: int) -> dict[str, float]:
    return {name: round(count / rows, 6) for name, count in counts.items()}


def name_of(edge: float) -> str:
    """The name of the bin that ends there."""
    return f"{edge:.6g}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value.value if isinstance(value, Enum) else value)[:MAX_CHARS]
