"""Traces as a receiver gets them: of requests, their parts and their batches."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.service.server import Service, Start, free_port, publish

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}

ASKS_ANOTHER = """
from opentelemetry import propagate

from app.predictor import BaseFeatures, BasePrediction, BasePredictor


class Features(BaseFeatures):
    x: float


class Prediction(BasePrediction):
    sent: dict[str, str]


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(x=1)
    runs_inline = {runs_inline}

    def load(self, artifact_dir, device):
        pass

    def predict(self, batch):
        headers = dict()
        propagate.inject(headers)
        return [Prediction(sent=headers) for _ in batch]
"""


class Receiver:
    """What OTLP over HTTP brings."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                receiver.take(ExportTraceServiceRequest.FromString(content))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            for attribute in resource.resource.attributes:
                if attribute.key == "service.name":
                    self.services.add(attribute.value.string_value)
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture
def traced(start: Start, receiver: Receiver) -> Service:
    service = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_BSP_SCHEDULE_DELAY=50,
        BATCH_POLICY="window",
        BATCH_MAX_WAIT_MS=500,
        SERVICE_TITLE="Doubles",
    )
    return service.wait_for("/ready")


def line_of(service: Service, request_id: str) -> dict[str, Any]:
    service.wait_until(lambda: service.log_lines_of(request_id, "request"))
    [line] = service.log_lines_of(request_id, "request")
    return line


def attributes(span: Span) -> dict[str, object]:
    """Strings and whole numbers."""
    return {
        attribute.key: attribute.value.string_value or attribute.value.int_value
        for attribute in span.attributes
    }


def test_a_trace_tells_the_parts_of_a_request(traced: Service, receiver: Receiver) -> None:
    body = {"features": {"x": 1}}
    answer = traced.client.post("/v1/predict", json=body, headers=SAMPLED)
    traced.wait_until(lambda: receiver.named("POST /v1/predict"))
    [request] = receiver.named("POST /v1/predict")
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SPAN_KIND_SERVER
    assert receiver.services == {"Doubles"}
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-{request.span_id.hex()}-0")
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/predict",
        "model.name": "double",
        "model.version": "1",
        "request.id": answer.headers["x-request-id"],
        "url.path": "/v1/predict",
        "url.scheme": "http",
    }
    parts = ["validation", "cache", "queue", "compute"]
    at = request.start_time_unix_nano
    for name in parts:
        [part] = receiver.named(name)
        assert (part.trace_id, part.parent_span_id) == (request.trace_id, request.span_id)
        # The clocks of the parts and of the whole are compared to a microsecond or so.
        assert at - 100_000 <= part.start_time_unix_nano <= part.end_time_unix_nano
        at = part.end_time_unix_nano
    assert at <= request.end_time_unix_nano + 100_000
    assert line_of(traced, answer.headers["x-request-id"])["trace_id"] == TRACE


def test_a_batch_is_linked_to_the_requests_in_it(traced: Service, receiver: Receiver) -> None:
    with ThreadPoolExecutor(3) as threads:
        bodies = [{"features": {"x": x}} for x in range(3)]
        answers = threads.map(lambda body: traced.post_alone("/v1/predict", body), bodies)
        assert [answer.status_code for answer in answers] == [200] * 3
    traced.wait_until(lambda: len(receiver.named("POST /v1/predict")) == 3)
    requests = {span.span_id for span in receiver.named("POST /v1/predict")}
    batches = receiver.named("batch")
    assert {link.span_id for batch in batches for link in batch.links} == requests
    assert sum(len(batch.links) for batch in batches) == 3
    assert sum(int(str(attributes(batch)["inference.batch.rows"])) for batch in batches) == 3
    assert any(len(batch.links) > 1 for batch in batches)
    for compute in receiver.named("compute"):
        [link] = compute.links
        [batch] = [batch for batch in batches if batch.span_id == link.span_id]
        assert compute.parent_span_id in {link.span_id for link in batch.links}


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_who_is_not_answered_in_time_sees_where_the_time_went(
    start: Start, receiver: Receiver, pipe: Path
) -> None:
    """One is computed for longer than it may be, and one waits for it."""
    service = start(
        DEFAULT_MODEL="gate", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_BSP_SCHEDULE_DELAY=50
    ).wait_for("/ready")
    limit = {"X-Request-Timeout-Ms": "300"}

    def ask(path: str) -> httpx.Response:
        body = {"features": {"pipe": path}}
        return service.client.post("/v1/predict", json=body, headers=limit)

    with ThreadPoolExecutor(1) as other:
        computed = other.submit(ask, str(pipe))
        # Open when the model reads from it.
        with pipe.open("w"):
            waiting = ask("/dev/null")
            assert (computed.result().status_code, waiting.status_code) == (504, 504)
    service.wait_until(lambda: len(receiver.named("POST /v1/predict")) == 2)
    [compute] = receiver.named("compute")
    assert seconds(compute) > 0.2
    assert attributes(compute)["rows"] == 1
    assert max(map(seconds, receiver.named("queue"))) > 0.2
    line = line_of(service, waiting.headers["x-request-id"])
    assert line["queue_wait_ms"] > 200
    assert "batch_rows" not in line


@pytest.mark.parametrize("runs_inline", [True, False])
def test_what_a_model_asks_in_turn_belongs_to_the_batch(
    start: Start, receiver: Receiver, tmp_path: Path, runs_inline: bool
) -> None:
    source = ASKS_ANOTHER.replace("{runs_inline}", str(runs_inline))
    (tmp_path / "asks.py").write_text(source, encoding="utf-8")
    publish(tmp_path / "artifacts", "asks", none=b"")
    service = start(
        PREDICTORS_DIR=tmp_path,
        ARTIFACTS_DIR=tmp_path / "artifacts",
        DEFAULT_MODEL="asks",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_BSP_SCHEDULE_DELAY=50,
    ).wait_for("/ready")
    answer = service.predict("asks", x=1)
    service.wait_until(lambda: receiver.named("batch"))
    [batch] = receiver.named("batch")
    sent = answer.json()["prediction"]["sent"]["traceparent"]
    assert sent.startswith(f"00-{batch.trace_id.hex()}-{batch.span_id.hex()}-0")


def test_other_answers_are_traced_too(traced: Service, receiver: Receiver) -> None:
    traced.client.get("/v1/models")
    traced.client.get("/nowhere")
    traced.client.post("/v1/predict", json={"features": {"x": "1"}})
    traced.predict("faulty", fault="raise")
    names = ["GET /v1/models", "GET", "POST /v1/predict", "POST /v1/models/faulty/predict"]
    traced.wait_until(lambda: all(map(receiver.named, names)))
    found = [receiver.named(name)[0] for name in names]
    statuses = [attributes(span)["http.response.status_code"] for span in found]
    assert statuses == [200, 404, 422, 500]
    failed = [span.status.code == Status.STATUS_CODE_ERROR for span in found]
    assert failed == [False, False, False, True]
    [batch] = receiver.named("batch")
    assert batch.status.code == Status.STATUS_CODE_ERROR
    [line] = traced.log_lines("prediction failed")
    assert line["trace_id"] == found[-1].trace_id.hex()
    assert not [span for span in receiver.spans if "ready" in str(attributes(span))]


def test_what_the_caller_does_not_trace_is_not_traced(traced: Service, receiver: Receiver) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    answer = traced.client.post("/v1/predict", json={"features": {"x": 1}}, headers=headers)
    assert "traceresponse" not in answer.headers
    traced.client.get("/v1/models")
    traced.wait_until(lambda: receiver.named("GET /v1/models"))
    assert not receiver.named("POST /v1/predict")


def test_nothing_that_a_caller_sends_is_too_long_or_logged(
    traced: Service, receiver: Receiver
) -> None:
    traced.client.get("/" + "a" * 5000)
    headers = {**SAMPLED, "tracestate": "swordfish@@=" + "s" * 100}
    traced.client.post("/v1/predict", json={"features": {"x": 1}}, headers=headers)
    traced.wait_until(lambda: receiver.named("POST /v1/predict") and receiver.named("GET"))
    assert attributes(receiver.named("GET")[0])["url.path"] == "/" + "a" * 199
    assert "swordfish" not in traced.log


def test_one_in_so_many_is_traced(start: Start, receiver: Receiver) -> None:
    service = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_TRACES_SAMPLER="parentbased_traceidratio",
        OTEL_TRACES_SAMPLER_ARG=0,
    ).wait_for("/ready")
    assert "traceresponse" not in service.predict("double", x=1).headers
    body = {"features": {"x": 1}}
    answer = service.client.post("/v1/predict", json=body, headers=SAMPLED)
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")


@pytest.mark.parametrize("sampler", ["traceidratio", "parentbased_traceidratio"])
def test_chance_decides_which(start: Start, receiver: Receiver, sampler: str) -> None:
    service = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_TRACES_SAMPLER=sampler,
        OTEL_TRACES_SAMPLER_ARG=0.5,
    ).wait_for("/ready")
    answers = [service.predict("double", x=x) for x in range(100)]
    # All or none of a hundred would be the case once in 10^30 times.
    assert 0 < sum("traceresponse" in answer.headers for answer in answers) < 100


@pytest.mark.parametrize(
    ("header", "logged"),
    [
        (f"00-{TRACE}-{PARENT}-00", TRACE),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        ("00-nonsense", None),
        ("\xff" * 300, None),
    ],
)
def test_without_traces_the_log_has_the_caller_s_id(
    service: Service, header: str, logged: str | None
) -> None:
    headers = {b"traceparent": header.encode("latin-1")}
    answer = service.client.post("/v1/predict", json={"features": {"x": 1}}, headers=headers)
    assert answer.status_code == 200
    assert "traceresponse" not in answer.headers
    assert line_of(service, answer.headers["x-request-id"]).get("trace_id") == logged


def test_a_receiver_that_is_not_there_costs_no_answer_and_no_flood_of_lines(start: Start) -> None:
    service = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}",
        OTEL_BSP_SCHEDULE_DELAY=50,
        OTEL_BSP_MAX_QUEUE_SIZE=20,
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE=10,
    ).wait_for("/ready")
    for x in range(200):
        assert service.predict("double", x=x).status_code == 200
    service.close()
    assert service.exit_code() == 0
    full = [line for line in service.log_lines() if "Queue full" in line["event"]]
    assert 0 < len(full) <= 20


def test_an_address_that_is_none_stops_the_start(start: Start) -> None:
    service = start(OTEL_EXPORTER_OTLP_ENDPOINT="collector:4318")
    assert service.exit_code() != 0
    assert "Invalid settings: OTEL_EXPORTER_OTLP_ENDPOINT: " in service.log
