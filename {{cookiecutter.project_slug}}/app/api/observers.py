"""Who is told of requests that have been answered: metrics, the log, and traces."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from contextvars import Context
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from app.access_log import AccessLog
from app.api.json_route import Call, JsonRoute
from app.inference import CacheStatus
from app.tickets import BatchTimings
from app.traceparent import trace_id_of

if TYPE_CHECKING:
    from app.tracing import Tracing

log = logging.getLogger(__name__)

MAX_PATH_CHARS = 200
"""Of a path that somebody asked for, in the log or a trace."""


class Observers:
    """Tells of the requests that end in a turn of the event loop once all have their answers.

    Of paths that are `quiet` there are no traces, and lines in the log only if it is to have all.
    """

    def __init__(
        self, access_log: AccessLog, tracing: "Tracing | None", quiet: Collection[str]
    ) -> None:
        self._access_log = access_log
        self._writes_json = access_log.writes_json and access_log.takes(logging.INFO)
        self._tracing = tracing
        self._quiet = quiet
        self._ended: list[Call] = []
        self._heads: dict[JsonRoute, bytes] = {}

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        # Once, as in app.metrics.
        return asyncio.get_running_loop()

    def begin(self, call: Call) -> None:
        """A request has come."""
        if self._tracing and _path_of(call) not in self._quiet:
            call.span = self._tracing.begin(call.headers, _method_of(call), call.started)

    def end(self, call: Call, status: int) -> None:
        """It has been answered with `status`, or is not to be answered any more."""
        if not self._ended:
            # Not in the context of the one that happens to be the first.
            self._loop.call_soon(self._tell, context=Context())
        call.status = status
        call.ended = monotonic()
        call.seconds = call.ended - call.started
        self._ended.append(call)

    def _tell(self) -> None:
        calls, self._ended = self._ended, []
        by_route: dict[JsonRoute, list[Call]] = {}
        for call in calls:
            if call.route:
                by_route.setdefault(call.route, []).append(call)
            if call.span:
                _safely(_end_span, call)
        for route, those in by_route.items():
            route.metrics.ended([call.status for call in those], [call.seconds for call in those])
        # Last, as it fails where nobody reads the log any more.
        self._write(calls)
        self._access_log.flush()

    def _write(self, calls: Iterable[Call]) -> None:
        """A line in the log for each; some wait for its `flush`."""
        access_log, form = self._access_log, b""
        form_of: tuple[object, ...] = ()
        for call in calls:
            route, timings = call.route, call.timings
            batch = timings.batch if timings else None
            is_traced = call.span or b"traceparent" in call.headers
            if not (route and self._writes_json) or is_traced or (timings and not batch):
                _safely(self._write_fields, call)
                continue
            # What `_fields` gives, in a fifth of the time.
            if (route, call.cache, batch) != form_of:
                form_of = route, call.cache, batch
                form = self._form(route, call.cache, batch)
            # A sane request id needs no escapes.
            values: tuple[object, ...] = call.status, call.seconds * 1000, call.request_id.encode()
            if timings and batch:
                values += ((batch.started - timings.queued) * 1000,)
            access_log.write_line(form % values)

    def _write_fields(self, call: Call) -> None:
        level = logging.INFO if call.route or _path_of(call) not in self._quiet else logging.DEBUG
        if self._access_log.takes(level):
            self._access_log.write(level, _fields(call))

    def _form(
        self, route: JsonRoute, cache: CacheStatus | None, batch: BatchTimings | None
    ) -> bytes:
        """A line but for status, milliseconds, request id and, with a batch, wait in milliseconds.

        Of requests that are told together those whose rows were in one batch share it: it has the
        time in it, and how long the batch took so far.
        """
        text = self._heads.get(route) or self._head(route)
        text += b',"status":%d,"duration_ms":%.3f,"request_id":"%b"'
        if cache:
            text += b',"cache":"' + cache.encode() + b'"'
        if batch:
            text += b',"queue_wait_ms":%%.3f,"batch_rows":%d' % batch.rows
            if batch.seconds is not None:
                text += b',"compute_ms":%.3f' % (1000 * batch.seconds)
        return text + self._access_log.end_of_line(logging.INFO)

    def _head(self, route: JsonRoute) -> bytes:
        """What is the same in all lines of a route, as a format."""
        head = to_json(_of_route(route))[:-1].replace(b"%", b"%%")
        # It has a version from when it is loaded.
        if route.model.version:
            self._heads[route] = head
        return head


def _safely(tell: Callable[[Call], None], call: Call) -> None:
    """Of the others it is told all the same."""
    try:
        tell(call)
    except Exception:
        log.exception("telling of a request failed")


def _trace_id(call: Call) -> str | None:
    return call.span.trace_id if call.span else trace_id_of(call.headers)


def _of_route(route: JsonRoute) -> dict[str, Any]:
    model = route.model
    return {
        "method": "POST",
        "path": route.path,
        "model": model.name,
        "model_version": model.version,
    }


def _ms(seconds: float) -> float:
    """With three digits. To round takes three times as long."""
    return int(seconds * 1e6) / 1000


def _path_of(call: Call) -> str:
    """What was asked for, as far as it is told."""
    if call.route or not call.scope:
        return _route_path_of(call)
    return str(call.scope["path"])[:MAX_PATH_CHARS]


def _route_path_of(call: Call) -> str:
    """Empty if no route was found."""
    found = call.route or (call.scope or {}).get("route")
    return getattr(found, "path", "")


def _method_of(call: Call) -> str:
    return str(call.scope["method"]) if call.scope else "POST"


def _scheme_of(call: Call) -> str:
    return call.exchange.scheme if call.exchange else str((call.scope or {}).get("scheme", "http"))


def _fields(call: Call) -> dict[str, Any]:
    """Of its line in the log."""
    route = call.route
    fields: dict[str, Any] = {
        "method": _method_of(call),
        "path": _path_of(call),
        "status": int(call.status),
        "duration_ms": _ms(call.seconds),
        "request_id": call.request_id,
    }
    if trace_id := _trace_id(call):
        fields["trace_id"] = trace_id
    if route:
        fields["model"], fields["model_version"] = route.model.name, route.model.version
    if call.cache:
        fields["cache"] = call.cache
    if timings := call.timings:
        batch = timings.batch
        # Who was not answered in time waits still, or is being computed.
        fields["queue_wait_ms"] = _ms((batch.started if batch else call.ended) - timings.queued)
        if batch:
            fields["batch_rows"] = batch.rows
            if batch.seconds is not None:
                fields["compute_ms"] = _ms(batch.seconds)
    return fields


def _end_span(call: Call) -> None:
    route = call.route
    attributes: dict[str, Any] = {
        "http.request.method": _method_of(call),
        "url.path": _path_of(call),
        "url.scheme": _scheme_of(call),
        "request.id": call.request_id,
    }
    if path := _route_path_of(call):
        attributes["http.route"] = path
    if route:
        attributes["model.name"] = route.model.name
        attributes["model.version"] = route.model.version or ""
        _tell_parts(call)
    if call.span:
        call.span.end(call.status, attributes, call.ended)


def _tell_parts(call: Call) -> None:
    span, timings = call.span, call.timings
    if span is None or call.parsed is None:
        return
    begun, parsed = call.parsed
    span.part("validation", begun, parsed)
    if call.cache:
        asked_model = timings.queued if timings else call.ended
        span.part("cache", parsed, asked_model, status=call.cache)
    if timings:
        batch = timings.batch
        span.part("queue", timings.queued, batch.started if batch else call.ended)
        if batch:
            end = call.ended if batch.seconds is None else batch.started + batch.seconds
            span.part("compute", batch.started, end, batch.trace, rows=batch.rows)
