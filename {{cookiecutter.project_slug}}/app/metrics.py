"""Prometheus metrics: of requests by route, of batches by model."""

from functools import cache
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
COMPUTE_BUCKETS_S = (0.0001, 0.00025, 0.0005, *LATENCY_BUCKETS_S)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

_requests = Counter("http_requests_total", "Requests.", ["method", "handler", "status"])
_durations = Histogram(
    "http_request_duration_seconds",
    "From the end of a request's header to the end of its answer.",
    ["method", "handler"],
    buckets=LATENCY_BUCKETS_S,
)

_MODEL = ["model", "version"]
_outcomes = Counter("inference_requests_total", "Requests to a model.", [*_MODEL, "outcome"])
_rejections = Counter("inference_rejected_total", "Requests refused.", [*_MODEL, "reason"])
_queue_rows = Gauge("inference_queue_depth", "Rows that wait.", _MODEL, multiprocess_mode="livesum")
_queue_waits = Histogram(
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

RejectReason = Literal["not_ready", "queue_full", "deadline"]
Outcome = Literal["ok", "invalid", "failed", "rejected", "expired", "cancelled"]


class ModelMetrics:
    """The metrics of one version of one model. Looking labels up takes longer than counting."""

    def __init__(self, model: str, version: str) -> None:
        self._rejection = cache(lambda reason: _rejections.labels(model, version, reason))
        self._outcome = cache(lambda outcome: _outcomes.labels(model, version, outcome))
        self._queue_rows = _queue_rows.labels(model, version)
        self._rows_waiting = 0
        self.queue_wait = _queue_waits.labels(model, version)
        self._batch_rows = _batch_rows.labels(model, version)
        self._compute = _compute.labels(model, version)
        self.reruns = _reruns.labels(model, version)
        self.max_rows = _max_rows.labels(model, version)

    def waiting(self, rows: int) -> None:
        """So many rows wait."""
        # Mostly as many as before: none.
        if rows != self._rows_waiting:
            self._rows_waiting = rows
            self._queue_rows.set(rows)

    def ran(self, rows: int, seconds: float) -> None:
        """A batch was run."""
        self._batch_rows.observe(rows)
        self._compute.observe(seconds)

    def rejected(self, reason: RejectReason) -> None:
        self._rejection(reason).inc()

    def ended(self, outcome: Outcome) -> None:
        """A request to the model has ended so."""
        self._outcome(outcome).inc()


class RouteMetrics:
    """The metrics of the requests to one route."""

    def __init__(self, method: str, handler: str) -> None:
        self._count = cache(lambda status: _requests.labels(method, handler, str(status)))
        self._durations = _durations.labels(method, handler)

    def ended(self, status: int, seconds: float) -> None:
        """A request was answered."""
        self._count(status).inc()
        self._durations.observe(seconds)


def count_request(method: str, handler: str, status: str, seconds: float) -> None:
    """A request to a route without `RouteMetrics` was answered."""
    _requests.labels(method, handler, status).inc()
    _durations.labels(method, handler).observe(seconds)
