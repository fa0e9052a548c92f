"""What values a model was trained on and gives: the reference that drift is measured against.

It lies beside the model's files as `reference.json`, and the manifest vouches for it like for
them. Values are in bins: numbers in about ten that are equally full, by the deciles of the sample;
yes or no, words and classes, of which there are few, in one for each.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
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
MIN_ROWS = 100
"""With fewer, the shares of ten bins are chance."""

BATCH_ROWS = 32

NONE = "(none)"
OTHER = "(other)"
"""In parentheses, as a word of the sample may be `other`."""

LAST = "+Inf"


class FieldReference(BaseModel):
    """The values of one field in the sample."""

    edges: list[float] | None = Field(default=None, max_length=BINS)
    """The largest number of each bin, in order; above the last is one more. None: words, or whole
    numbers like words."""

    shares: dict[str, float] = Field(max_length=MAX_WORDS + 2)
    """The part of the sample that is in a bin, by its name; all bins that there can be."""

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
    directory: Path,
    predictor_class: type[BasePredictor[Any, Any]],
    sample: Sequence[BaseFeatures],
    leave_out: Collection[str] = (),
) -> None:
    """Ask the model in `directory` for `sample`, and write down the values of both beside it.

    For use in `new_version`, when the model's files are written. The sample should be like what
    callers send in a day, a thousand rows or more; those that cannot be scored are left out.
    Fields have bins that are numbers, or one of at most 20 words, up to the fiftieth.

    Args:
        leave_out: features that change by themselves, such as the time, or that are nobody's
            business, as words become names in the metrics.

    Raises:
        ValueError: fewer than `MIN_ROWS` rows could be scored; the last error is its cause.
    """
    predictor = predictor_class()
    predictor.load(directory, "auto")
    scored, error = _scored(predictor, sample)
    if len(scored) < MIN_ROWS:
        reason = f"of {len(sample)} rows {len(scored)} could be scored; {MIN_ROWS} are needed"
        raise ValueError(reason) from error
    reference = Reference(
        rows=len(scored),
        features=_fields([features for features, _ in scored], leave_out),
        prediction=_fields([prediction for _, prediction in scored]),
    )
    content = reference.model_dump_json(indent=2, exclude_none=True)
    (directory / REFERENCE).write_text(content + "\n", encoding="utf-8")


def _scored(
    predictor: BasePredictor[Any, Any], sample: Sequence[BaseFeatures]
) -> tuple[list[tuple[BaseFeatures, BasePrediction]], Exception | None]:
    """Rows with what the model says of them, and the last error."""
    by_shape: dict[Hashable, list[BaseFeatures]] = {}
    for row in sample:
        by_shape.setdefault(predictor.shape_key(row), []).append(row)
    scored: list[tuple[BaseFeatures, BasePrediction]] = []
    last: Exception | None = None
    most = max(predictor.allowed_batch_sizes, default=predictor.batch_max_rows or BATCH_ROWS)
    for same in by_shape.values():
        todo = [same[first : first + most] for first in range(0, len(same), most)]
        while todo:
            rows = todo.pop()
            try:
                outcomes = _ask(predictor, rows)
            except Exception as error:
                last = error
                # Which row it was is seen when each is alone.
                todo += [[row] for row in rows] if len(rows) > 1 else []
                continue
            scored += [
                (row, outcome)
                for row, outcome in zip(rows, outcomes, strict=False)
                if not isinstance(outcome, ItemError)
            ]
    return scored, last


def _ask(
    predictor: BasePredictor[Any, Any], rows: list[BaseFeatures]
) -> Sequence[BasePrediction | ItemError]:
    """More than there are rows where a batch has to be filled up."""
    size = next((size for size in predictor.allowed_batch_sizes if size >= len(rows)), len(rows))
    return predictor.predict(rows + rows[:1] * (size - len(rows)))


def _fields(
    rows: Sequence[BaseModel], leave_out: Collection[str] = ()
) -> dict[str, FieldReference]:
    fields: dict[str, FieldReference] = {}
    for name in type(rows[0]).model_fields:
        if name in leave_out or len(fields) == MAX_FIELDS:
            continue
        if field := _field([getattr(row, name) for row in rows]):
            fields[name] = field
    return fields


def _field(values: Sequence[Any]) -> FieldReference | None:
    """None: they are not of a kind that has bins."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if _are_classes(present):
        edges, bins = None, [*sorted(set(map(_word, present))), OTHER, NONE]
    elif all(isinstance(value, int | float) for value in present):
        edges = _edges(present)
        bins = [*map(name_of, edges), LAST, NONE]
    else:
        return None
    empty = FieldReference(edges=edges, shares=dict.fromkeys(bins, 0.0))
    counts = Counter(map(empty.bin_of, values))
    shares = {name: round(counts[name] / len(values), 6) for name in bins}
    return FieldReference(edges=edges, shares=shares)


def _are_classes(values: Sequence[Any]) -> bool:
    """Whether each is one of a few that have nothing between them."""
    if all(isinstance(value, bool | str | Enum) for value in values):
        return len(set(map(_word, values))) <= MAX_WORDS
    return all(type(value) is int for value in values) and len(set(values)) <= BINS


def _edges(numbers: Sequence[float]) -> list[float]:
    different = set(numbers)
    cuts = different if len(different) < BINS else quantiles(numbers, n=BINS, method="inclusive")
    return sorted({float(name_of(cut)) for cut in cuts})


def name_of(edge: float) -> str:
    """The name of the bin that ends there."""
    return f"{edge:.12g}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value.value if isinstance(value, Enum) else value)[:MAX_CHARS]
