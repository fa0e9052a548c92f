"""What the trace of a request tells of it."""

from time import monotonic
from typing import Any

from starlette.types import Scope

from app.api.json_route import Call, JsonRoute

MAX_PATH_CHARS = 200
"""Of a path that somebody asked for, in a log or a trace."""


def end_span(call: Call, scope: Scope, status: int, route: JsonRoute | None) -> None:
    """Tell the parts of a request that has been answered, if it is traced."""
    span = call.span
    if span is None:
        return
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"][:MAX_PATH_CHARS],
        "url.scheme": scope["scheme"],
        "request.id": call.request_id,
    }
    path = route.path if route else getattr(scope.get("route"), "path", None)
    if path:
        attributes["http.route"] = path
    if route:
        attributes["model.name"] = route.model.name
        attributes["model.version"] = route.model.version or ""
        _tell_parts(call)
    span.end(status, attributes)


def _tell_parts(call: Call) -> None:
    span, timings = call.span, call.timings
    if span is None or call.parsed is None:
        return
    (begun, parsed), now = call.parsed, monotonic()
    span.part("validation", begun, parsed)
    if call.cache:
        span.part("cache", parsed, timings.queued if timings else now, status=call.cache)
    if timings:
        batch = timings.batch
        # Who was not answered in time waits until now, or is being computed still.
        span.part("queue", timings.queued, batch.started if batch else now)
        if batch:
            end = now if batch.seconds is None else batch.started + batch.seconds
            span.part("compute", batch.started, end, batch.trace, rows=batch.rows)
