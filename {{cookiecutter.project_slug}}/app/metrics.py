"""Prometheus metrics: of requests by route, of batches by model."""

import asyncio
import os
from bisect import bisect_left
from collections import Counter as TallyOf
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from functools import cache, cached_property
from time import time
from typing import ClassVar, Literal, get_args

from prometheus_client import Counter, Gauge, Histogram, values

if place := os.environ.get("WORKER_PLACE"):
    # One of several workers; gunicorn.conf.py says why their files are not by process id.
    values.ValueClass = values.MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
COMPUTE_BUCKETS_S = (0.0001, 0.00025, 0.0005, *LATENCY_BUCKETS_S)
DIGEST_CHARS = 12
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ManyHistogram(Histogram):
    """A histogram that counts many values at once, for a fraction of the time.

    prometheus_client has no way to; this does what its `observe` does, exemplars aside.
    """

    def observe_all(self, amounts: Sequence[float]) -> None:
        counts = TallyOf(bisect_left(self._upper_bounds, amount) for amount in amounts)
        self._sum.inc(sum(amounts))
        for number, count in counts.items():
            self._buckets[number].inc(count)


_requests = Counter("http_requests_total", "Requests.", ["method", "handler", "status"])
_durations = ManyHistogram(
    "http_request_duration_seconds",
    "From the end of a request's header to the end of its answer.",
    ["method", "handler"],
    buckets=LATENCY_BUCKETS_S,
)

_MODEL = ["model", "version"]
_outcomes = Counter("inference_requests_total", "Requests to a model.", [*_MODEL, "outcome"])
_rejections = Counter("inference_rejected_total", "Requests refused.", [*_MODEL, "reason"])
_queue_rows = Gauge("inference_queue_depth", "Rows that wait.", _MODEL, multiprocess_mode="livesum")
_queue_waits = ManyHistogram(
    "inference_queue_wait_seconds",
    "From a request's arrival to the begin of its first batch.",
    _MODEL,
    buckets=COMPUTE_BUCKETS_S,
)
_batch_rows = Histogram("inference_batch_size", "Rows in a batch.", _MODEL, buckets=ROWS_BUCKETS)
_compute = Histogram(
    "inference_compute_seconds", "What a batch took.", _MODEL, buckets=COMPUTE_BUCKETS_S
)
_reruns = Counter(
    "inference_bisections_total", "Runs of halves of batches that had failed.", _MODEL
)
_max_rows = Gauge(
    "inference_batch_max_rows", "Most rows in a batch.", _MODEL, multiprocess_mode="livemin"
)

_cache_hits = Counter("cache_hits_total", "Rows answered by the cache.", [*_MODEL, "tier"])
_cache_misses = Counter(
    "cache_misses_total", "Rows that the cache did not have, or was not asked for.", _MODEL
)
_cache_passed_by = Counter(
    "cache_passed_by_total",
    "Misses for which the cache was not asked, as too many rows of a quick model were in vain.",
    _MODEL,
)
_cache_unasked = Counter(
    "cache_redis_unasked_total",
    "Rows that Redis was not asked for, as too many others were looked up in vain.",
    _MODEL,
)
_cache_bypasses = Counter(
    "cache_bypasses_total", "Requests that were not to be answered by the cache.", _MODEL
)
_cache_followers = Counter(
    "cache_followers_total", "Requests that went with the run of an equal one.", _MODEL
)
_cache_invalid = Counter(
    "cache_invalid_total", "Cached answers that did not fit the schema.", _MODEL
)
_cache_bytes = Gauge("cache_bytes", "What the cache in memory holds.", multiprocess_mode="livesum")

_info = Gauge(
    "model_info",
    "1 for a version that answers. `device`: what it is to run on, `provider`: what it runs on.",
    [*_MODEL, "digest", "device", "provider"],
    multiprocess_mode="livemax",
)
_loaded = Gauge(
    "model_loaded_timestamp_seconds", "When it was loaded last.", _MODEL, multiprocess_mode="max"
)
_load_seconds = Gauge(
    "model_load_seconds", "What loading it took.", _MODEL, multiprocess_mode="livemax"
)

_values = Counter(
    "inference_values_total",
    "Rows by the bin of a value that was sent or predicted; many are estimated from a sample.",
    [*_MODEL, "digest", "field", "bin"],
)
_looked_at = Counter(
    "inference_values_rows_total", "Rows whose values were looked at.", [*_MODEL, "digest"]
)
_expected = Gauge(
    "inference_values_expected_ratio",
    "The part of the rows that was in the bin when the model was trained.",
    [*_MODEL, "digest", "field", "bin"],
    multiprocess_mode="livemax",
)

RejectReason = Literal["not_ready", "queue_full", "queue_bytes", "deadline"]
Outcome = Literal["ok", "invalid", "failed", "out_of_memory", "rejected", "expired", "cancelled"]
"""`failed`: the model raised, or broke its contract."""

USUAL_STATUSES = (200, 422, 429, 500, 503, 504)
"""Counted from zero: where a counter begins with errors, Prometheus sees no increase."""


class _CountedLater:
    """Counts what happens in a turn of the event loop in the next one, in one go.

    Who comes alone to a model that runs on the loop has its answer by then.
    """

    _is_due = False

    def __init__(self) -> None:
        # Who asks for it makes a system call each time, in CPython 3.11: 3 us under load.
        self._loop = asyncio.get_running_loop()

    def _count_later(self) -> None:
        self._is_due = True
        self._loop.call_soon(self._count_now, context=Context())

    def _count_now(self) -> None:
        self._is_due = False
        self._count()

    def _count(self) -> None:
        """Count what was noted since the last time."""
        raise NotImplementedError


class ModelMetrics(_CountedLater):
    """The metrics of one version of one model. Looking labels up takes longer than counting."""

    def __init__(self, model: str, version: str) -> None:
        super().__init__()
        self._labels = (model, version)
        self._rejection = cache(lambda reason: _rejections.labels(model, version, reason))
        self._outcome = cache(lambda outcome: _outcomes.labels(model, version, outcome))
        self._queue_rows = _queue_rows.labels(model, version)
        for reason in get_args(RejectReason):
            self._rejection(reason)
        for outcome in get_args(Outcome):
            self._outcome(outcome)
        self._rows_waiting = 0
        self._begun: list[float] = []
        self._ran: list[tuple[int, float]] = []
        self._ended: TallyOf[Outcome] = TallyOf()
        self._rejected: TallyOf[RejectReason] = TallyOf()
        self._queue_wait = _queue_waits.labels(model, version)
        self._batch_rows = _batch_rows.labels(model, version)
        self._compute = _compute.labels(model, version)
        self.reruns = _reruns.labels(model, version)
        self.max_rows = _max_rows.labels(model, version)

    def loaded(self, seconds: float, *, digest: str, device: str, provider: str) -> None:
        """It answers from now on."""
        _info.labels(*self._labels, digest[:DIGEST_CHARS], device, provider).set(1)
        _loaded.labels(*self._labels).set(time())
        _load_seconds.labels(*self._labels).set(seconds)

    def waiting(self, rows: int) -> None:
        """So many rows wait."""
        # Mostly as many as before: none.
        if rows != self._rows_waiting:
            self._rows_waiting = rows
            self._queue_rows.set(rows)

    def began(self, waits: Sequence[float]) -> None:
        """The first batches of as many requests began, which had waited for so many seconds."""
        self._begun += waits
        if not self._is_due:
            self._count_later()

    def ran(self, rows: int, seconds: float) -> None:
        """A batch was run."""
        self._ran.append((rows, seconds))
        if not self._is_due:
            self._count_later()

    def rejected(self, reason: RejectReason) -> None:
        self._rejected[reason] += 1
        if not self._is_due:
            self._count_later()

    def ended(self, outcome: Outcome) -> None:
        """A request to the model has ended so."""
        self._ended[outcome] += 1
        if not self._is_due:
            self._count_later()

    def _count(self) -> None:
        begun, self._begun = self._begun, []
        ran, self._ran = self._ran, []
        ended, self._ended = self._ended, TallyOf()
        rejected, self._rejected = self._rejected, TallyOf()
        self._queue_wait.observe_all(begun)
        for rows, seconds in ran:
            self._batch_rows.observe(rows)
            self._compute.observe(seconds)
        for outcome, count in ended.items():
            self._outcome(outcome).inc(count)
        for reason, count in rejected.items():
            self._rejection(reason).inc(count)


class ValueMetrics:
    """The metrics of what is sent to one version of one model, and of what it predicts.

    The digest tells its bins from those of another training under the same version.
    """

    def __init__(self, model: str, version: str, digest: str) -> None:
        self._labels = (model, version, digest[:DIGEST_CHARS])
        self.rows_looked_at = _looked_at.labels(*self._labels)

    def counters(self, field: str, expected: Mapping[str, float]) -> Callable[[str], Counter]:
        """Gives the counter of a bin of `field`; those `expected` are there at once."""
        for name, share in expected.items():
            _expected.labels(*self._labels, field, name).set(share)
        counter = cache(lambda name: _values.labels(*self._labels, field, name))
        for name in expected:
            counter(name)
        return counter


class CacheMetrics(_CountedLater):
    """The metrics of the cache of one version of one model."""

    _shown_bytes: ClassVar[int] = 0
    """All models share what is held."""

    def __init__(self, model: str, version: str) -> None:
        super().__init__()
        self.model, self.version = model, version
        self._memory_hits = _cache_hits.labels(model, version, "memory")
        self.redis_hits = _cache_hits.labels(model, version, "redis")
        self._misses = _cache_misses.labels(model, version)
        self.bypasses = _cache_bypasses.labels(model, version)
        self.followers = _cache_followers.labels(model, version)
        self.invalid = _cache_invalid.labels(model, version)
        self._passed_by = _cache_passed_by.labels(model, version)
        self._unasked = _cache_unasked.labels(model, version)
        self._hits_noted = self._misses_noted = self._unasked_noted = 0

    def memory_hit(self) -> None:
        """A row was found in memory."""
        self._hits_noted += 1
        if not self._is_due:
            self._count_later()

    def missed(self, rows: int) -> None:
        """So many rows were found nowhere."""
        self._misses_noted += rows
        if not self._is_due:
            self._count_later()

    def passed_by(self, rows: int) -> None:
        """So many rows went to the model as they would without a cache."""
        self._misses.inc(rows)
        self._passed_by.inc(rows)

    def not_looked_up(self, rows: int) -> None:
        """Redis was not asked for so many rows."""
        self._unasked_noted += rows
        if not self._is_due:
            self._count_later()

    def _count(self) -> None:
        hits, self._hits_noted = self._hits_noted, 0
        misses, self._misses_noted = self._misses_noted, 0
        unasked, self._unasked_noted = self._unasked_noted, 0
        self._memory_hits.inc(hits)
        self._misses.inc(misses)
        self._unasked.inc(unasked)

    def show_bytes(self, held: int) -> None:
        """The cache in memory holds so many, within a hundredth."""
        if abs(held - CacheMetrics._shown_bytes) * 100 > held:
            CacheMetrics._shown_bytes = held
            _cache_bytes.set(held)


@cache
def _of_redis() -> tuple[Counter, Counter, Histogram, Gauge]:
    """Made when they are needed: what is there costs time in every scrape."""
    return (
        Counter("cache_redis_dropped_total", "Answers that were not written to Redis."),
        Counter("cache_redis_failures_total", "Exchanges with Redis that failed."),
        Histogram(
            "cache_redis_lookup_seconds", "What looking keys up took.", buckets=COMPUTE_BUCKETS_S
        ),
        Gauge(
            "cache_redis_breaker_state",
            "0: Redis is in use, 1: it is tried again, 2: it is left alone.",
            ["operations"],
            multiprocess_mode="livemax",
        ),
    )


class StoreMetrics:
    """The metrics of the exchange with Redis."""

    def __init__(self) -> None:
        self.dropped, self.failures, self.lookup_seconds, self._breaker = _of_redis()
        # To be seen before anything has failed.
        self.breaker("lookups")
        self.breaker("writes")

    def breaker(self, operations: Literal["lookups", "writes"]) -> Gauge:
        return self._breaker.labels(operations)


class RouteMetrics:
    """The metrics of the requests to one route."""

    def __init__(self, method: str, handler: str) -> None:
        self._labels = (method, handler)
        self._count = cache(lambda status: _requests.labels(method, handler, str(status)))
        for status in USUAL_STATUSES:
            self._count(status)

    @cached_property
    def _durations(self) -> ManyHistogram:
        # With the first request: most routes of a service are never asked, and what is there costs
        # time in every scrape.
        return _durations.labels(*self._labels)

    def ended(self, statuses: Sequence[int], seconds: Sequence[float]) -> None:
        """So many requests were answered, each with a status and after some seconds."""
        for status, count in TallyOf(statuses).items():
            self._count(status).inc(count)
        self._durations.observe_all(seconds)


def count_request(method: str, handler: str, status: str, seconds: float) -> None:
    """A request to a route without `RouteMetrics` was answered."""
    _requests.labels(method, handler, status).inc()
    _durations.labels(method, handler).observe(seconds)
