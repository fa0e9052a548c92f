"""Counts the values that callers send and the model gives, by the bins of its reference.

How far their shares are from those of the reference is for Prometheus to say, over any time and
all replicas: see deploy/prometheus/rules.yaml.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import Context
from operator import attrgetter
from random import random, sample
from typing import Any

from app.metrics import ValueMetrics
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.reference import FieldReference, Reference

WINDOW_S = 1.0


class ValueCounts:
    """Of the rows of one second it counts a random sample, each for as many as it stands for.

    To count a row takes some microseconds, which is much for a small model, so it is done in one
    go after the second is over, and of at most 2 * `rows_per_s` rows. Below that it is exact.
    """

    def __init__(self, reference: Reference, metrics: ValueMetrics, rows_per_s: int) -> None:
        named = [(f"features.{name}", field) for name, field in reference.features.items()]
        named += [(f"prediction.{name}", field) for name, field in reference.prediction.items()]
        self._fields = [(field, metrics.counters(name, field.shares)) for name, field in named]
        self._looked_at = metrics.rows_looked_at
        self._features = _values_of(reference.features)
        self._prediction = _values_of(reference.prediction)
        self._most = 2 * rows_per_s
        self._sample: list[Sequence[Any]] = []
        self._step = 1
        """Of so many rows one is taken, on average."""

        self._skip = 0
        """So many are not taken until the next one is."""

    def note(
        self, rows: Sequence[BaseFeatures], outcomes: Sequence[BasePrediction | ItemError]
    ) -> None:
        """These were answered."""
        at = self._skip
        while at < len(rows):
            self._take(rows[at], outcomes[at])
            # Each step from 1 to 2n - 1 is as likely, so that nothing that recurs is in step.
            at += 1 + int(random() * (2 * self._step - 1))  # noqa: S311
        self._skip = at - len(rows)

    @property
    def may_skip(self) -> bool:
        """Whether the next row is not in the sample."""
        return self._skip > 0

    def skip(self) -> None:
        """A row was answered that need not be looked at."""
        self._skip -= 1

    def _take(self, features: BaseFeatures, outcome: BasePrediction | ItemError) -> None:
        if isinstance(outcome, ItemError):
            return
        if not self._sample:
            loop = asyncio.get_running_loop()
            loop.call_later(WINDOW_S, self._count, context=Context())
        self._sample.append((*self._features(features), *self._prediction(outcome)))
        if len(self._sample) > self._most:
            # At random, as every second one may be of the same kind.
            self._sample = sample(self._sample, len(self._sample) // 2)
            self._step *= 2

    def _count(self) -> None:
        taken, weight = self._sample, self._step
        self._sample, self._step, self._skip = [], 1, 0
        self._looked_at.inc(len(taken))
        columns = zip(*taken, strict=True)
        self._count_next(zip(self._fields, columns, strict=True), weight)

    def _count_next(self, columns: Iterator[Any], weight: int) -> None:
        """Of one field in each turn of the event loop, which is not held up."""
        for (field, counters), values in columns:
            for name, count in Counter(map(field.bin_of, values)).items():
                counters(name).inc(weight * count)
            loop = asyncio.get_running_loop()
            loop.call_soon(self._count_next, columns, weight, context=Context())
            return


def _values_of(fields: dict[str, FieldReference]) -> Any:
    """Gives the values of `fields` of a row, as a sequence."""
    if len(fields) == 1:
        [name] = fields
        return lambda row: (getattr(row, name),)
    return attrgetter(*fields) if fields else lambda _: ()
