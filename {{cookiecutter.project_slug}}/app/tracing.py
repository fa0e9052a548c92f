"""OpenTelemetry spans of requests and batches, and the W3C trace context of both.

A request's span is begun when it comes, so that its ids are known; its parts are told afterwards,
from the times that are noted anyway. Nothing is done for a request that is not sampled.

Imported only where traces are wanted: OpenTelemetry takes half a second and 15 MB.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from random import getrandbits, random
from threading import Thread
from time import monotonic, monotonic_ns, time_ns
from typing import Any

from opentelemetry import context as current
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.traceparent import trace_id_of

FLUSH_S = 2.0
"""How long the end of the service may wait for the spans that are left to be sent."""

Attributes = Mapping[str, str | int | float]
Headers = Mapping[bytes, bytes]

W3C = TraceContextTextMapPropagator()

DROP = Decision.DROP
"""Looked up once, as that takes 0.1 us in CPython 3.11."""

RATIO = re.compile(r"(?:ParentBased\{root:)?TraceIdRatioBased\{([0-9.e-]+)\}")
"""How a sampler describes itself by which chance decides (OpenTelemetry's specification of the
SDK, TraceIdRatioBased)."""

MAX_TRACESTATE = 512
"""Characters that have to be passed on (section 3.3.1.5); of more nothing is."""


def current_trace_id() -> str | None:
    """That of the request, or the batch, on whose behalf this is called, if it is sampled."""
    span = trace.get_current_span()
    return _trace_id(span) if span.is_recording() else None


_request_span: ContextVar[Span | None] = ContextVar("request_span", default=None)
"""As OpenTelemetry has it as well, from where it takes ten times as long to get."""


def _trace_id(span: Span) -> str:
    return trace.format_trace_id(span.get_span_context().trace_id)


def _parent(headers: Headers) -> current.Context:
    if trace_id_of(headers) is None:
        return current.Context()
    carrier = {"traceparent": headers[b"traceparent"].decode()}
    state = headers.get(b"tracestate", b"")
    if len(state) <= MAX_TRACESTATE:
        carrier["tracestate"] = state.decode("latin-1")
    return W3C.extract(carrier, context=current.Context())


class RequestSpan:
    """The span of a request that is sampled."""

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, current.Context())
        # Taken once, as two readings of two clocks are never the same moment.
        self._since_epoch_ns = time_ns() - monotonic_ns()

    @property
    def trace_id(self) -> str:
        return _trace_id(self._span)

    @property
    def header(self) -> bytes:
        """As the value of `traceparent`."""
        carrier: dict[str, str] = {}
        W3C.inject(carrier, context=self._context)
        return carrier["traceparent"].encode()

    def enter(self) -> None:
        """What this task does from now on, it does on behalf of the request."""
        current.attach(self._context)
        _request_span.set(self._span)

    def part(
        self, name: str, begin: float, end: float, batch: Any = None, **attributes: str | float
    ) -> None:
        """A part of the request that is over, with its times by `monotonic`.

        Args:
            batch: a `BatchSpan` that it was a part of as well.
        """
        links = [Link(batch.span.get_span_context())] if batch else []
        part = self._tracer.start_span(
            name,
            context=self._context,
            links=links,
            attributes=attributes,
            start_time=self._since_epoch_ns + int(begin * 1e9),
        )
        part.end(self._since_epoch_ns + int(max(begin, end) * 1e9))

    def end(self, status: int, attributes: Attributes, ended: float) -> None:
        """The request was answered with `status`, at a time by `monotonic`."""
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes(attributes)
        if route := attributes.get("http.route"):
            self._span.update_name(f"{attributes['http.request.method']} {route}")
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._since_epoch_ns + int(ended * 1e9))


class BatchSpan:
    """The span of a batch in which there are rows of requests that are sampled."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.context: Context = copy_context()
        """Where the model is to be asked: what it asks in turn belongs to the batch."""

        self.context.run(current.attach, set_span_in_context(span, current.Context()))

    def end(self, rows: int, *, has_failed: bool) -> None:
        self.span.set_attribute("inference.batch.rows", rows)
        if has_failed:
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


class Tracing:
    """Makes spans, and has them sent to OTEL_EXPORTER_OTLP_ENDPOINT in the background."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        # It would write what callers send into the log.
        logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
        resource = Resource.create()
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": service_name}))
        # Asked first: to make a span that is not sampled takes three times as long. By
        # OTEL_TRACES_SAMPLER.
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        found = RATIO.match(self._sampler.get_description())
        self._ratio = float(found[1]) if found else None
        """The part of the requests without a parent that is sampled, if chance decides."""

        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("app")

    def begin(self, headers: Headers, method: str, started: float) -> RequestSpan | None:
        """The span of a request, unless it is not sampled.

        Args:
            started: when its header was there, by `monotonic`.
        """
        parent = _parent(headers) if b"traceparent" in headers else None
        if not self._is_sampled(parent, method):
            return None
        span = self._tracer.start_span(
            method,
            context=parent or current.Context(),
            kind=SpanKind.SERVER,
            start_time=time_ns() - int((monotonic() - started) * 1e9),
        )
        return RequestSpan(self._tracer, span) if span.is_recording() else None

    def _is_sampled(self, parent: current.Context | None, method: str) -> bool:
        if parent is None and self._ratio is not None:
            # What the sampler would say, too, but that would take 1.3 us of the 40 of a request.
            return random() < self._ratio  # noqa: S311
        given = trace.get_current_span(parent).get_span_context() if parent else None
        trace_id = given.trace_id if given and given.is_valid else getrandbits(128)
        sampled = self._sampler.should_sample(parent, trace_id, method)
        return sampled.decision is not DROP

    def request(self) -> Span | None:
        """The span of the request on whose behalf this is called."""
        return _request_span.get()

    def batch(self, requests: Sequence[Any]) -> BatchSpan | None:
        """The span of a batch of `requests`, as `request` gave them, that begins now.

        It is a part of the first one that is sampled, and linked to all of them.
        """
        spans: list[Span] = list(filter(None, requests))
        if not spans:
            return None
        context = set_span_in_context(spans[0], current.Context())
        links = [Link(span.get_span_context()) for span in spans]
        return BatchSpan(self._tracer.start_span("batch", context=context, links=links))

    def close(self) -> None:
        """Send what is left, or give up after `FLUSH_S`."""
        # It would wait for a receiver that hangs for half a minute.
        flush = Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_S)
