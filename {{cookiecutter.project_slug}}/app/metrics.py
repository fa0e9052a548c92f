"""Prometheus metrics."""

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def instrument(app: FastAPI) -> None:
    """Count and time the requests of `app`, probes and metrics aside, and serve /metrics."""
    Instrumentator(
        should_group_status_codes=False,
        excluded_handlers=["^/(health|startup|ready|metrics)$"],
    ).instrument(
        app,
        latency_highr_buckets=LATENCY_BUCKETS_S,
        latency_lowr_buckets=LATENCY_BUCKETS_S,
    ).expose(app, tags=["operations"], summary="Prometheus metrics")
