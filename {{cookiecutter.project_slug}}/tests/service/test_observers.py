"""What is told of requests, quickly, is what would be told of them slowly."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from app.access_log import AccessLog
from app.api.json_route import Call, JsonRoute
from app.api.observers import Observers, _fields
from app.api.problems import problem_reply, problem_response
from app.errors import FieldError, Overloaded, ServiceError, Unauthorized, invalid_fields
from app.metrics import ManyHistogram, ModelMetrics, RouteMetrics
from app.settings import Settings
from app.tickets import BatchTimings, Timings

TRACEPARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def observers() -> Observers:
    return Observers(AccessLog(Settings(log_format="json", default_model="m")), None, ())


class Route:
    """As much of one as is told."""

    path = "/v1/predict"

    def __init__(self, version: str | None) -> None:
        self.model = SimpleNamespace(name="m", version=version)


def route(version: str | None) -> JsonRoute:
    return cast(JsonRoute, Route(version))


def ended(of: JsonRoute, call: Call) -> Call:
    call.route, call.status, call.seconds, call.ended = of, 200, 0.125, 10.0
    return call


def lines_of(observers: Observers, calls: list[Call]) -> list[dict[str, Any]]:
    """What is logged of requests that are told together, without what every line has."""
    observers._write(calls)
    lines: list[dict[str, Any]] = list(map(json.loads, observers._access_log._lines))
    observers._access_log._lines.clear()
    for line in lines:
        assert [line.pop(name) for name in ("event", "level", "logger")] == [
            "request",
            "info",
            "app.access",
        ]
        assert line.pop("timestamp")
    return lines


@pytest.mark.parametrize(
    "timings",
    [
        None,
        Timings(queued=9.5),
        Timings(queued=9.5, batch=BatchTimings(started=9.75, rows=3)),
        Timings(queued=9.5, batch=BatchTimings(started=9.75, rows=3, seconds=0.25)),
    ],
)
@pytest.mark.parametrize("cache", [None, "miss"])
@pytest.mark.parametrize("headers", [{}, {b"traceparent": TRACEPARENT}])
def test_a_line_is_the_same_as_bytes_and_as_fields(
    observers: Observers, timings: Timings | None, cache: Any, headers: dict[bytes, bytes]
) -> None:
    call = Call("an-id", 0.0, headers)
    call.timings, call.cache = timings, cache
    of = ended(route("1"), call)
    assert lines_of(observers, [of]) == [_fields(of)]


def test_lines_of_other_batches_and_routes_are_not_mixed_up(observers: Observers) -> None:
    batches = [BatchTimings(started=9.75, rows=rows, seconds=rows / 8) for rows in (1, 2)]
    routes = [route("0%"), route("1%")]
    calls = []
    for batch, of, cache in [(0, 0, None), (0, 0, None), (1, 0, None), (1, 1, None), (1, 1, "hit")]:
        call = Call("an-id", 0.0, {})
        call.timings, call.cache = Timings(queued=9.5, batch=batches[batch]), cast(Any, cache)
        calls.append(ended(routes[of], call))
    assert lines_of(observers, calls) == [_fields(call) for call in calls]


def test_a_route_has_the_version_of_its_model_from_when_there_is_one(observers: Observers) -> None:
    call, of = Call("an-id", 0.0, {}), route(None)
    [line] = lines_of(observers, [ended(of, call)])
    assert line["model_version"] is None
    of.model.version = "7"  # type: ignore[misc]
    [line] = lines_of(observers, [ended(of, call)])
    assert line["model_version"] == "7"


def test_many_values_at_once_are_counted_like_one_after_the_other() -> None:
    values = [0.0, 0.001, 0.0010001, 0.5, 10.0, 11.0, 0.5]
    registry = CollectorRegistry()
    bounds = (0.001, 0.5, 10.0)
    single = Histogram("single", "", buckets=bounds, registry=registry)
    many = ManyHistogram("many", "", buckets=bounds, registry=registry)
    for value in values:
        single.observe(value)
    many.observe_all(values[:3])
    many.observe_all(values[3:])
    many.observe_all([])
    found: dict[str, list[float]] = {
        metric.name: [s.value for s in metric.samples if not s.name.endswith("_created")]
        for metric in registry.collect()
    }
    assert found["many"] == pytest.approx(found["single"])


async def of_model(name: str) -> None:
    """Have the metrics of a model that was loaded."""
    ModelMetrics(name, "1")


def test_counters_of_what_may_go_wrong_begin_at_zero() -> None:
    RouteMetrics("POST", "/zero")
    asyncio.run(of_model("zero"))
    route = {"method": "POST", "handler": "/zero"}
    for status in ("200", "422", "429", "500", "503", "504"):
        labels = route | {"status": status}
        assert REGISTRY.get_sample_value("http_requests_total", labels) == 0
    model = {"model": "zero", "version": "1"}
    failed = model | {"outcome": "failed"}
    assert REGISTRY.get_sample_value("inference_requests_total", failed) == 0
    refused = model | {"reason": "queue_full"}
    assert REGISTRY.get_sample_value("inference_rejected_total", refused) == 0


@pytest.mark.parametrize(
    "error",
    [
        Overloaded('100% "full"', retry_after=2.5),
        Overloaded("100% full"),
        Unauthorized("100% full"),
        invalid_fields([FieldError(field="x", message="Input should be 1")]),
    ],
    ids=repr,
)
def test_a_problem_that_is_sent_past_asgi(error: ServiceError) -> None:
    for request_id in ("mine:1", "yours"):
        reply, response = problem_reply(error, request_id), problem_response(error, request_id)
        assert (reply.status, reply.content) == (response.status_code, response.body)
        more = {tuple(line.split(b": ")) for line in reply.more_lines.splitlines()}
        others = {(b"content-type", reply.media_type), *more}
        assert {*response.raw_headers} - others == {(b"content-length", b"%d" % len(reply.content))}
        assert others < {*response.raw_headers}
