"""What the measurements come to: the knee, the capacity, and settings, each with its reason."""

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
BATCH_SHARE = 0.1
"""The part of the objective that one batch may take: a caller may wait for the batch before, for
its own, and for the queue."""

LITTLE_CPU = 0.4


@dataclass(frozen=True)
class Objective:
    """What is promised to callers."""

    p99_ms: float
    rate: float | None = None
    """Requests a second at the peak; None: not known."""

    @property
    def batch_ms(self) -> float:
        """What one batch may take."""
        return self.p99_ms * BATCH_SHARE


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


def best_batch(batches: Sequence[Batch], limit_ms: float) -> Batch:
    """The smallest that is nearly as productive as any, of those that take `limit_ms` at most.

    Where even one row takes longer than that, a batch may take twice as long as that row: as two
    rows would, one after the other.
    """
    limit_ms = max(limit_ms, 2 * batches[0].ms)
    allowed = [batch for batch in batches if batch.ms <= limit_ms]
    best = max(batch.rows_per_s for batch in allowed)
    return next(batch for batch in allowed if batch.rows_per_s >= ENOUGH * best)


def per_pod(at_capacity: Step) -> float:
    """Requests a second that a pod should get, so that there is time to start another."""
    return at_capacity.asked / HEADROOM


def replicas(rate: float, at_capacity: Step) -> int:
    return max(LEAST_REPLICAS, math.ceil(rate / per_pod(at_capacity)))


def cpu_at(steps: Sequence[Step], rate: float) -> float | None:
    """CPUs that are busy at `rate`, between the steps of an open loop that lie around it."""
    known = sorted((step.asked, step.usage.cpu) for step in steps if step.usage.cpu is not None)
    for (low, low_cpu), (high, high_cpu) in pairwise(known):
        if low <= rate <= high:
            return low_cpu + (high_cpu - low_cpu) * (rate - low) / (high - low)
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


Advice = tuple[str, str]
"""What it is about, and what is to be said of it."""


def advise(found: Findings) -> list[Advice]:
    objective, steps = found.objective, found.steps
    at_knee, at_capacity = knee(steps), capacity(steps, objective)
    said = [("Knee", _on_knee(at_knee)), ("Capacity", _on_capacity(at_capacity, found))]
    said.append(("BATCH_MAX_ROWS", _on_batches(found)))
    if at_capacity:
        said.append(("Replicas", _on_replicas(at_capacity, objective)))
        said.append(("autoscale-hpa", _on_cpu(at_capacity, steps)))
        said.append(("autoscale-keda", _on_queue(found)))
    return said


def _on_knee(at_knee: Step | None) -> str:
    if at_knee is None:
        return "none: at every rate there were requests that failed."
    return (
        f"{number(at_knee.asked)} requests a second, where throughput divided by mean response "
        f"time ({number(at_knee.mean_ms)} ms) is greatest. Up to there more load costs little "
        "latency; from there on it costs more latency than it brings throughput."
    )


def _on_capacity(at_capacity: Step | None, found: Findings) -> str:
    objective = found.objective
    promise = (
        f"p99 within {number(objective.p99_ms)} ms, less than {percent(MAX_FAILED)} failed, and no "
        "queue that kept growing"
    )
    if at_capacity is None:
        least = min(found.steps, key=lambda step: step.asked)
        return (
            f"none: at no rate was {promise}. At the lowest, {number(least.asked)} requests a "
            f"second, p99 was {number(least.p99_ms)} ms and {percent(least.failed)} failed, so "
            "more replicas will not help: look at what a single request takes."
        )
    is_last = at_capacity.asked == max(step.asked for step in found.steps)
    lower = [step for step in found.steps if step.asked < at_capacity.asked]
    missed = sum(not meets(step, objective) for step in lower)
    doubt = f" At {missed} of the lower rates it was not so: measure longer (--seconds)."
    return (
        f"{'at least ' if is_last else ''}{number(at_capacity.asked)} requests a second, the "
        f"highest rate at which it was so: {promise}. p99 was {number(at_capacity.p99_ms)} ms."
        f"{doubt if missed else ''}"
    )


def _on_batches(found: Findings) -> str:
    if not found.batches:
        return "not known, as the predictor could not be timed here."
    predictor, limit_ms = found.predictor, found.objective.batch_ms
    best = best_batch(found.batches, limit_ms)
    top = max(batch.rows_per_s for batch in found.batches)
    reason = (
        f"{best.rows} {'row takes' if best.rows == 1 else 'rows take'} {best.ms:.3g} ms, which "
        f"gives {percent(best.rows_per_s / top)} of the most rows a second that any batch gave"
    )
    if best.ms <= limit_ms:
        reason += f", and no more than a tenth of the objective ({number(limit_ms)} ms)."
    else:
        reason += (
            f". Even one row takes {found.batches[0].ms:.3g} ms, a long time of the objective."
        )
    if predictor.allowed_batch_sizes:
        sizes = ", ".join(map(str, predictor.allowed_batch_sizes))
        return f"not looked at: allowed_batch_sizes of the predictor are {sizes}. Of them {reason}"
    if predictor.batch_max_rows:
        own = f"the predictor says batch_max_rows = {predictor.batch_max_rows}"
        return f"not looked at: {own}. Measured, it would be {best.rows}: {reason}"
    now = f" (now {found.max_rows})" if found.max_rows else ""
    now = ", as it is" if found.max_rows == best.rows else now
    return f"{best.rows}{now}: {reason}{_on_filling(found)}"


def _on_filling(found: Findings) -> str:
    fullest = max((step.usage.rows_per_batch or 0 for step in found.steps), default=0)
    if found.max_rows is None or not 0 < fullest < found.max_rows / 2:
        return ""
    return (
        f" Under load batches had {number(fullest)} rows on average where they were fullest, so "
        "for requests of one row the limit hardly matters."
    )


def _on_replicas(at_capacity: Step, objective: Objective) -> str:
    share = number(per_pod(at_capacity))
    reason = "two thirds of the capacity, as the load may grow by a half until a new pod is there"
    if objective.rate is None:
        return (
            f"one for each {share} requests a second at the peak (say it with --rate), and two at "
            f"least, for when one goes. That is {reason}."
        )
    return (
        f"{replicas(objective.rate, at_capacity)} for {number(objective.rate)} requests a second "
        f"at the peak: {share} for each, {reason}; and two at least, for when one goes."
    )


def _on_cpu(at_capacity: Step, steps: Sequence[Step]) -> str:
    share = per_pod(at_capacity)
    cpu = cpu_at(steps, share)
    if cpu is None:
        return (
            "not known: /metrics does not say what CPU this load took (several workers or "
            "replicas, other callers, or no Linux). The component has 65."
        )
    where = f"at {number(share)} requests a second, a pod's share, {cpu:.2f} CPUs were busy"
    if cpu < LITTLE_CPU:
        return f"no: {where}; CPUs say little of the load. Take autoscale-keda."
    requested = math.ceil(cpu)
    more = f" with {requested} CPUs in the request" if requested > 1 else ""
    return (
        f"averageUtilization: {round(cpu / requested * 100)}{more} (the component has 65): {where}."
    )


def _on_queue(found: Findings) -> str:
    predictor = found.predictor
    rows = predictor.allowed_batch_sizes[-1:] or (predictor.batch_max_rows,)
    if rows[0] is None and found.batches:
        rows = (best_batch(found.batches, found.objective.batch_ms).rows,)
    full = rows[0] or found.max_rows
    if full is None:
        return "threshold: as many rows as a full batch has (BATCH_MAX_ROWS)."
    return (
        f"threshold: {full}, a full batch. When so many rows wait at all times, a caller waits for "
        "two batches, and not for one."
    )


def number(value: float) -> str:
    """With as many digits as mean something."""
    if not math.isfinite(value):
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    return f"{share * 100:.3g}%"
