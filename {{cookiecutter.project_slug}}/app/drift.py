"""Counts the values that callers send and the model gives, by the bins of its reference.

How far their shares are from those of the reference is for Prometheus to say, over any time and
all replicas: see deploy/prometheus/rules.yaml.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextvars import Context
from operator import attrgetter
from random import random
from typing import Any

from app.metrics import ModelMetrics
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.reference import FieldReference, Reference

WINDOW_S = 1.0


class ValueCounts:
    """Of the rows of one second it counts a random sample, each for as many as it stands for.

    To count a row takes some microseconds, which is much for a small model, so it is done in one
    go after the second is over, and of at most 2 * `rows_per_s` rows. Below that it is exact.
    """

    def __init__(self, reference: Reference, metrics: ModelMetrics, rows_per_s: int) -> None:
        named = [(f"features.{name}", field) for name, field in reference.features.items()]
        named += [(f"prediction.{name}", field) for name, field in reference.prediction.items()]
        self._fields = [(field, metrics.values(name, field.shares)) for name, field in named]
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

    def _take(self, features: BaseFeatures, outcome: BasePrediction | ItemError) -> None:
        if isinstance(outcome, ItemError):
            return
        if not self._sample:
            loop = asyncio.get_running_loop()
            loop.call_later(WINDOW_S, self._count, context=Context())
        self._sample.append((*self._features(features), *self._prediction(outcome)))
        if len(self._sample) > self._most:
            del self._sample[::2]
            self._step *= 2

    def _count(self) -> None:
        sample, weight = self._sample, self._step
        self._sample, self._step, self._skip = [], 1, 0
        for (field, counters), values in zip(self._fields, zip(*sample, strict=True), strict=True):
            for name, count in Counter(map(field.bin_of, values)).items():
                counters(name).inc(weight * count)


def _values_of(fields: dict[str, FieldReference]) -> Any:
    """Gives the values of `fields` of a row, as a sequence."""
    if len(fields) == 1:
        [name] = fields
        return lambda row: (getattr(row, name),)
    return attrgetter(*fields) if fields else lambda _: ()
