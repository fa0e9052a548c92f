"""Counts the requests that FastAPI answers, and serves /metrics."""

import re
from collections.abc import Collection

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info

from app import metrics

METRICS = "/metrics"


def instrument(app: FastAPI, probes: Collection[str]) -> None:
    """Count and time the requests to `app`, probes and metrics aside, and serve /metrics."""
    Instrumentator(
        should_group_status_codes=False,
        excluded_handlers=[f"^{re.escape(path)}$" for path in (*probes, METRICS)],
    ).add(_count).instrument(app).expose(app, tags=["operations"], summary="Prometheus metrics")


def _count(info: Info) -> None:
    metrics.count_request(
        info.method, info.modified_handler, info.modified_status, info.modified_duration
    )
