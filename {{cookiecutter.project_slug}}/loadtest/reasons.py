"""The advice in words: what to set, and why, with the numbers."""

import math
from collections.abc import Sequence

from loadtest.advice import (
    ENOUGH,
    HEADROOM,
    LITTLE_CPU,
    MAX_FAILED,
    Findings,
    Objective,
    advised_batch,
    batch_of_now,
    best_batch,
    capacity,
    gain,
    knee,
    meets,
    per_pod,
    rate_at,
    replicas,
    share_of_best,
)
from loadtest.batches import Batch
from loadtest.measure import Step

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
            f"none: no rate had {promise}. At the lowest, {number(least.asked)} requests a "
            f"second, p99 was {number(least.p99_ms)} ms and {percent(least.failed)} failed, so "
            "more replicas will not help: look at what a single request takes."
        )
    is_last = at_capacity.asked == max(step.asked for step in found.steps)
    lower = [step for step in found.steps if step.asked < at_capacity.asked]
    missed = sum(not meets(step, objective) for step in lower)
    doubt = f" At {missed} of the lower rates it was not so: measure longer (--seconds)."
    return (
        f"{'at least ' if is_last else ''}{number(at_capacity.asked)} requests a second, the "
        f"highest rate with {promise}. p99 was {number(at_capacity.p99_ms)} ms."
        f"{doubt if missed else ''}"
    )


def _on_batches(found: Findings) -> str:
    if not found.batches:
        return "not known, as the predictor could not be timed here."
    predictor, best = found.predictor, best_batch(found.batches, found.objective)
    own = ""
    if predictor.allowed_batch_sizes:
        sizes = ", ".join(map(str, predictor.allowed_batch_sizes))
        own = f"the predictor's allowed_batch_sizes are {sizes}"
    elif predictor.batch_max_rows:
        own = f"the predictor says batch_max_rows = {predictor.batch_max_rows}"
    if own:
        return f"not looked at: {own}. Of what was measured, {_on_batch(best, found)}."
    return _on_setting(best, found)


def _on_setting(best: Batch, found: Findings) -> str:
    advised, now = advised_batch(found), batch_of_now(found)
    if now is None:
        before = f" (now {found.max_rows})" if found.max_rows else ""
        return f"{best.rows}{before}: {_on_batch(best, found)}."
    if advised is not now:
        why = f"{now.rows} take {now.ms:.3g} ms, too long for the objective"
        if best.rows > now.rows:
            why = f"{percent(gain(now, best, found))} less work at the highest load"
        return f"{best.rows} (now {now.rows}): {why}; {_on_batch(best, found)}."
    kept = f"{now.rows}, as it is: {_on_batch(now, found)}."
    if best.rows <= now.rows:
        return kept
    return (
        f"{kept} {best.rows} would give more, but the model is not what takes the time: it would "
        f"be {percent(gain(now, best, found))} less work at the highest load."
    )


def _on_batch(batch: Batch, found: Findings) -> str:
    objective, one_row = found.objective, found.batches[0]
    limit = objective.batch_ms(one_row.ms)
    said = (
        f"batches of {batch.rows} take {batch.ms:.3g} ms, of {number(limit)} that the objective "
        f"leaves, for {percent(share_of_best(batch, found))} of the most rows a second"
    )
    if one_row.ms > objective.p99_ms * 0.1:
        said += f"; one row alone takes {one_row.ms:.3g} ms, so look at the model first"
    return said


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
    cpu = at_capacity.usage.cpu
    if cpu is None:
        return (
            "not known: /metrics does not say what CPU this load took (several workers or "
            "replicas, other callers, or no Linux). The component has 65."
        )
    if cpu < LITTLE_CPU:
        return (
            f"no: at its capacity a pod has {cpu:.2f} CPUs busy, so they say little of the load. "
            "Take autoscale-keda."
        )
    requested = math.ceil(cpu - 0.1)
    more = f", of {requested} CPUs in the request" if requested > 1 else ""
    target = f"averageUtilization: {round(cpu / HEADROOM / requested * 100)}{more}"
    rate = rate_at(steps, cpu / HEADROOM)
    early = ""
    if rate and rate < ENOUGH * per_pod(at_capacity):
        early = (
            f" It is reached at {number(rate)} requests a second already, as small batches take "
            "more CPU for each row; autoscale-keda looks at the queue instead."
        )
    return (
        f"{target} (the component has 65): two thirds of the {cpu:.2f} CPUs that are busy at the "
        f"capacity, so that pods at their limit become half as many again.{early}"
    )


def _on_queue(found: Findings) -> str:
    predictor = found.predictor
    full = next(iter(predictor.allowed_batch_sizes[-1:]), predictor.batch_max_rows)
    if full is None:
        full = advised_batch(found).rows if found.batches else found.max_rows
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
