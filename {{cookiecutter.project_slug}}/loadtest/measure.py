"""What one step of load came to: what callers saw, and what the service says of itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from statistics import fmean, median

from prometheus_client.parser import text_string_to_metric_families

from loadtest.client import Tally
from loadtest.service import Service

OTHERS_SHARE = 0.02
"""By so much may the requests that the service has counted differ from those that were sent."""


Counters = dict[str, float]
"""From /metrics of the service: those of the model and of the process, by name."""


@dataclass(frozen=True)
class Usage:
    """What the service did in a step, by its own metrics. None: it does not say."""

    rows_per_batch: float | None = None
    queue_ms: float | None = None
    """What a request waited for its batch, on average."""

    cpu: float | None = None
    """CPUs that were busy, on average: 1 is a whole one."""


@dataclass(frozen=True)
class Step:
    """Latencies are of the requests answered with 200; infinite without any."""

    asked: float
    """Connections in a closed loop, requests a second in an open one."""

    per_s: float
    """Answers with 200 a second, while requests were sent."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    failed: float
    """The share of requests that were not answered with 200."""

    growth: float
    """By how much longer a request took, for each second that it came later: more than a little
    means that a queue builds up, however short it still was at the end of the step."""

    client_cpu: float
    usage: Usage = Usage()

    @property
    def power(self) -> float:
        """Kleinrock's: throughput by response time, in requests a second squared."""
        return self.per_s / self.mean_ms * 1000


def step_of(asked: float, tally: Tally, usage: Usage) -> Step:
    ordered = sorted(tally.latencies)
    in_time = sum(
        begun + latency <= tally.seconds
        for begun, latency in zip(tally.begun, tally.latencies, strict=True)
    )
    return Step(
        asked=asked,
        per_s=in_time / tally.seconds,
        mean_ms=fmean(ordered) * 1000 if ordered else math.inf,
        p50_ms=percentile_ms(ordered, 0.5),
        p95_ms=percentile_ms(ordered, 0.95),
        p99_ms=percentile_ms(ordered, 0.99),
        failed=1 - len(ordered) / tally.due if tally.due else 0,
        growth=growth(tally),
        client_cpu=tally.busy,
        usage=usage,
    )


def percentile_ms(ordered_s: Sequence[float], share: float) -> float:
    """The smallest of `ordered_s` that is not less than `share` of them."""
    if not ordered_s:
        return math.inf
    return ordered_s[max(0, math.ceil(share * len(ordered_s)) - 1)] * 1000


def growth(tally: Tally) -> float:
    """Seconds that latency grew a second, from the first quarter of a step to its last; 0 if it did
    not grow by half of itself, which may be chance."""
    quarter = tally.seconds / 4
    pairs = list(zip(tally.begun, tally.latencies, strict=True))
    first = [latency for begun, latency in pairs if begun < quarter]
    last = [latency for begun, latency in pairs if begun >= 3 * quarter]
    if not first or not last or median(last) < 1.5 * median(first):
        return 0
    return (median(last) - median(first)) / (3 * quarter)


def read_counters(service: Service, model: str) -> Counters | None:
    """None: the service shows no metrics."""
    totals: Counters = {}
    try:
        for family in text_string_to_metric_families(service.get("/metrics")):
            for sample in family.samples:
                is_ours = sample.labels.get("model", model) == model
                if is_ours and sample.labels.get("outcome", "ok") == "ok":
                    totals[sample.name] = totals.get(sample.name, 0) + sample.value
    except (OSError, HTTPException, ValueError):
        return None
    return totals


def usage_between(before: Counters | None, after: Counters | None, tally: Tally) -> Usage:
    """Nothing, where the metrics are not of what was sent: they are of one of several replicas,
    or others send as well."""
    if before is None or after is None:
        return Usage()

    def rise(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    def mean(histogram: str) -> float | None:
        count = rise(f"{histogram}_count")
        return rise(f"{histogram}_sum") / count if count else None

    least, most = len(tally.latencies) * (1 - OTHERS_SHARE), tally.due * (1 + OTHERS_SHARE)
    if not least <= rise("inference_requests_total") <= most:
        return Usage()
    wait_s = mean("inference_queue_wait_seconds")
    has_cpu = "process_cpu_seconds_total" in after
    busy_s = rise("process_cpu_seconds_total")
    return Usage(
        rows_per_batch=mean("inference_batch_size"),
        queue_ms=None if wait_s is None else wait_s * 1000,
        cpu=busy_s / tally.lasted if has_cpu else None,
    )
