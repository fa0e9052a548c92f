"""What the measurements come to: the knee, the capacity, and settings, as numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from app.discovery import PredictorClass
from loadtest.batches import Batch
from loadtest.measure import Step

MAX_FAILED = 0.01
MAX_GROWTH = 0.05
"""Seconds a second; see `Step.growth`. A load 5% above what can be answered lets it grow so."""

HEADROOM = 1.5
"""A new pod is there after half a minute, in which the load may grow by a half."""

LEAST_REPLICAS = 2
ENOUGH = 0.9
LEAST_GAIN = 0.05
"""Of the work for a request; for less, no setting is changed."""

LITTLE_CPU = 0.6


@dataclass(frozen=True)
class Objective:
    """What is promised to callers."""

    p99_ms: float
    rate: float | None = None
    """Requests a second at the peak; None: not known."""

    def batch_ms(self, one_row_ms: float) -> float:
        """What one batch may take, by what one of a single row takes: a tenth of the objective, as
        a caller may wait for the batch before, for its own, and in the queue; or else a half."""
        share = 0.1 if one_row_ms <= self.p99_ms * 0.1 else 0.5
        return max(one_row_ms, self.p99_ms * share)


def knee(steps: Sequence[Step]) -> Step | None:
    """The step of an open loop with the greatest power, of those in which nothing failed.

    Before it, more load costs little latency; after it, more latency than it gains throughput.
    L. Kleinrock, "Power and deterministic rules of thumb for probabilistic problems in computer
    communications", ICC 1979.
    """
    good = [step for step in steps if step.failed == 0 and step.per_s]
    return max(good, key=lambda step: step.power, default=None)


def capacity(steps: Sequence[Step], objective: Objective) -> Step | None:
    """The step of an open loop with the highest rate at which the objective was met for good."""
    met = [step for step in steps if meets(step, objective)]
    return max(met, key=lambda step: step.asked, default=None)


def meets(step: Step, objective: Objective) -> bool:
    is_kept_up = step.growth <= MAX_GROWTH
    return step.p99_ms <= objective.p99_ms and step.failed < MAX_FAILED and is_kept_up


def best_batch(batches: Sequence[Batch], objective: Objective) -> Batch:
    """The smallest that is nearly as productive as any, of those that are quick enough."""
    limit_ms = objective.batch_ms(batches[0].ms)
    allowed = [batch for batch in batches if batch.ms <= limit_ms]
    best = max(batch.rows_per_s for batch in allowed)
    return next(batch for batch in allowed if batch.rows_per_s >= ENOUGH * best)


def per_pod(at_capacity: Step) -> float:
    """Requests a second that a pod should get, so that there is time to start another."""
    return at_capacity.asked / HEADROOM


def replicas(rate: float, at_capacity: Step) -> int:
    return max(LEAST_REPLICAS, math.ceil(rate / per_pod(at_capacity)))


def rate_at(steps: Sequence[Step], cpu: float) -> float | None:
    """The rate at which so many CPUs are first busy, between the steps that lie around it."""
    known = sorted((step.asked, step.usage.cpu) for step in steps if step.usage.cpu is not None)
    for (low, low_cpu), (high, high_cpu) in pairwise(known):
        if low_cpu < cpu <= high_cpu:
            return low + (high - low) * (cpu - low_cpu) / (high_cpu - low_cpu)
    return None


@dataclass(frozen=True)
class Findings:
    """All that was measured."""

    predictor: PredictorClass
    objective: Objective
    batches: Sequence[Batch]
    """By size; empty where the predictor cannot be run here."""

    steps: Sequence[Step]
    """Of the open loop."""

    max_rows: int | None
    """Of a batch, as the service has it; None: it does not say."""


def advised_batch(found: Findings) -> Batch:
    """The batch to allow: that of now, unless it takes too long, or a larger one would be felt."""
    best, now = best_batch(found.batches, found.objective), batch_of_now(found)
    if now is None:
        return best
    is_larger_felt = best.rows > now.rows and gain(now, best, found) >= LEAST_GAIN
    is_too_long = now.ms > found.objective.batch_ms(found.batches[0].ms)
    is_quicker = best.ms < now.ms / 1.5
    return best if is_larger_felt or (is_too_long and is_quicker) else now


def batch_of_now(found: Findings) -> Batch | None:
    return next((batch for batch in found.batches if batch.rows == found.max_rows), None)


def share_of_best(batch: Batch, found: Findings) -> float:
    return batch.rows_per_s / max(other.rows_per_s for other in found.batches)


def gain(now: Batch, other: Batch, found: Findings) -> float:
    """The share of the time that a request has at the highest load which the model would spare."""
    most = max(step.per_s for step in found.steps)
    return most * (1 / now.rows_per_s - 1 / other.rows_per_s)
