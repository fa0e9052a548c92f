"""Requests, good and bad: what is answered, and that nothing bad reaches a model or breaks one."""

import json
import os
import random
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from app.intake import TOGETHER
from tests.service.server import (
    FAKES,
    Service,
    Start,
    assert_problem,
    publish,
    worker_pids,
)

JSON = {"Content-Type": "application/json"}
PREDICT = "/v1/predict"
GOOD = {"features": {"x": 21}}


def fields(answer: httpx.Response) -> list[str]:
    return [error["field"] for error in assert_problem(answer, 422)["errors"]]


class TestAnswer:
    def test_one_row(self, service: Service) -> None:
        answer = service.client.post(PREDICT, json=GOOD)
        body = answer.json()
        assert answer.status_code == 200
        assert body.keys() == {
            "request_id",
            "model",
            "model_version",
            "prediction",
            "processing_time_ms",
            "timestamp",
        }
        assert body["request_id"] == answer.headers["x-request-id"]
        assert (body["model"], body["model_version"]) == ("double", "1")
        assert body["prediction"] == {"y": 42}
        assert body["processing_time_ms"] >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", body["timestamp"])

    def test_rows_in_order(self, service: Service) -> None:
        rows = [{"x": value} for value in (3, 1, 2)]
        body = service.client.post(f"{PREDICT}/batch", json={"instances": rows}).json()
        assert body["predictions"] == [{"y": 6}, {"y": 2}, {"y": 4}]
        assert "prediction" not in body

    def test_by_the_name_of_the_model(self, service: Service) -> None:
        path = "/v1/models/double/predict"
        assert service.client.post(path, json=GOOD).json()["prediction"] == {"y": 42}
        batch = service.client.post(f"{path}/batch", json={"instances": [{"x": 1}]}).json()
        assert batch["predictions"] == [{"y": 2}]

    @pytest.mark.parametrize("media_type", ["application/json; charset=UTF-8", "Application/JSON"])
    def test_however_the_media_type_is_written(self, service: Service, media_type: str) -> None:
        headers = {"Content-Type": media_type}
        answer = service.client.post(PREDICT, content=json.dumps(GOOD), headers=headers)
        assert answer.status_code == 200


class TestRequestId:
    def test_a_sane_one_is_kept_and_logged(self, service: Service) -> None:
        headers = {"X-Request-ID": "order-66.b:c_d"}
        answer = service.client.post(PREDICT, json=GOOD, headers=headers)
        assert answer.headers["x-request-id"] == "order-66.b:c_d"
        assert answer.json()["request_id"] == "order-66.b:c_d"
        # The line is written right after the answer.
        service.wait_until(lambda: service.log_lines_of("order-66.b:c_d", "request"))
        assert len(service.log_lines_of("order-66.b:c_d", "request")) == 1

    @pytest.mark.parametrize("bad", [b"a b", b"x" * 129, b'a"b', b"<script>", b"\xc3\xbc"])
    def test_another_is_replaced(self, service: Service, bad: bytes) -> None:
        answer = service.client.get("/health", headers={b"X-Request-ID": bad})
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])

    @pytest.mark.parametrize("path", ["/health", "/nope", "/metrics", "/openapi.json", "/docs"])
    def test_every_answer_has_one(self, service: Service, path: str) -> None:
        assert service.client.get(path).headers["x-request-id"]


class TestInvalidInput:
    def test_every_wrong_field_is_named_with_what_was_expected(self, service: Service) -> None:
        answer = service.client.post(PREDICT, json={"features": {"x": "7", "note": 1, "z": 0}})
        assert fields(answer) == ["features.x", "features.note", "features.z"]
        messages = [error["message"] for error in answer.json()["errors"]]
        assert messages[0] == "Input should be a valid number"
        assert messages[1] == "Input should be a valid string"

    def test_rows_of_a_batch_are_named_by_their_number(self, service: Service) -> None:
        rows = [{"x": 1}, {"x": None}, {}, {"x": 1, "note": []}]
        answer = service.client.post(f"{PREDICT}/batch", json={"instances": rows})
        assert fields(answer) == ["instances.1.x", "instances.2.x", "instances.3.note"]

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", '"NaN"', "true"])
    def test_what_is_no_finite_number_is_refused(self, service: Service, number: str) -> None:
        content = '{"features": {"x": NUMBER}}'.replace("NUMBER", number)
        answer = service.client.post(PREDICT, content=content, headers=JSON)
        assert fields(answer) == ["features.x"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'"x"',
            b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}",
            b'{"features": {"x": 1}} trailing',
            b'{"features": {"x": 1}, "features": }',
            b'{"features": {"note": "\\ud800", "x": 1}}',
            b"[" * 10_000,
            b'{"features": ' * 1000,
            b'{"features": {"x": ' + b"9" * 5000 + b"}}",
            b'{"features": {"note": "\x00", "x": 1}}',
        ],
    )
    def test_what_is_no_json_object_is_refused(self, service: Service, content: bytes) -> None:
        answer = service.client.post(PREDICT, content=content, headers=JSON)
        assert_problem(answer, 422)

    def test_an_empty_batch_is_refused(self, service: Service) -> None:
        answer = service.client.post(f"{PREDICT}/batch", json={"instances": []})
        assert fields(answer) == ["instances"]

    def test_the_input_is_not_repeated(self, service: Service) -> None:
        content = {"features": {"x": "4111-1111-1111-1111", "note": {"pin": "1234567"}}}
        answer = service.client.post(PREDICT, json=content)
        assert "1111" not in answer.text
        assert "1234567" not in answer.text
        assert "1111-1111" not in service.log

    def test_many_mistakes_get_a_short_answer(self, service: Service) -> None:
        features = {"x": 1} | {f"f{number}": 1 for number in range(500)}
        answer = service.client.post(PREDICT, json={"features": features})
        assert len(fields(answer)) == 100
        assert answer.json()["detail"] == "500 invalid fields. The first 100 are listed."

    def test_a_long_name_is_cut(self, service: Service) -> None:
        answer = service.client.post(PREDICT, json={"features": {"x": 1, "n" * 5000: 1}})
        assert len(fields(answer)[0]) == 200


class TestOtherErrors:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Type": "application/json; charset=utf-16"},
            {"Content-Type": ""},
            {**JSON, "Content-Encoding": "gzip"},
        ],
    )
    def test_another_media_type(self, service: Service, headers: dict[str, str]) -> None:
        answer = service.client.post(PREDICT, content=json.dumps(GOOD), headers=headers)
        assert_problem(answer, 415)

    @pytest.mark.parametrize(
        "path", ["/v1", "/v2/predict", "/v1/predict/", "/v1/predict%0A", "/%00", "/..;/"]
    )
    def test_no_such_path(self, service: Service, path: str) -> None:
        assert_problem(service.client.post(path, json=GOOD), 404)

    @pytest.mark.parametrize("action", ["/predict", "/predict/batch"])
    def test_no_such_model(self, service: Service, action: str) -> None:
        answer = service.client.post(f"/v1/models/tripel{action}", json=GOOD)
        assert "double, faulty, gate" in assert_problem(answer, 404)["detail"]
        assert "tripel" not in answer.text
        assert_problem(service.client.get("/v1/models/tripel"), 404)

    def test_another_method(self, service: Service) -> None:
        answer = service.client.get(PREDICT)
        assert_problem(answer, 405)
        assert answer.headers["allow"] == "POST"
        assert_problem(service.client.delete("/health"), 405)


def exchange(service: Service, request: bytes) -> bytes:
    """Everything that comes back for `request` until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1000), b""))


def test_an_offer_of_http2_is_ignored(service: Service) -> None:
    body = json.dumps(GOOD).encode()
    answer = exchange(
        service,
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body,
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"prediction":{"y":42.0}' in answer


def test_what_looks_like_such_an_offer_in_a_body_stays_there(service: Service) -> None:
    body = b"\r\nUpgrade: h2c\r\n\r\n"
    head = (
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
        b"Content-Type: application/json\r\n" + f"Content-Length: {len(body)}\r\n\r\n".encode()
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 422 ")


@pytest.mark.parametrize(
    "line",
    [
        b"POST /v1/predict HTTP/1.0",
        b"POST /v1/predict HTTP/1.1",
        b"POST /v1/predict?from=a-form HTTP/1.1",
        b"POST /v1/pre%64ict HTTP/1.1",
    ],
)
def test_a_prediction_however_it_is_asked_for(service: Service, line: bytes) -> None:
    body = json.dumps(GOOD).encode()
    head = b"\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    answer = exchange(service, line + head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"\r\nx-request-id: ") == 1
    assert b'"prediction":{"y":42.0}' in answer


def test_a_header_may_have_space_around_its_value(service: Service) -> None:
    body = json.dumps(GOOD).encode()
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += b"Content-Type: \tapplication/json \r\nX-Request-Timeout-Ms:  5000 \t\r\n"
    answer = exchange(service, head + b"Content-Length: %d \r\n\r\n%b" % (len(body), body))
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_what_follows_an_answer_to_the_header_alone_does_no_harm(service: Service) -> None:
    # Refused while its header is parsed; its body and what comes after that are still to come.
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    refused = b"X-Request-Timeout-Ms: soon\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailer = b"2\r\n{}\r\n0\r\nX-Checksum: 1\r\n\r\n"
    body = json.dumps(GOOD).encode()
    good = b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    answer = exchange(service, head + refused + trailer + head + good)
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert answer.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 200 " in answer


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_is_a_problem_too(service: Service, request_: bytes) -> None:
    head, _, body = exchange(service, request_).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json" in head
    problem = json.loads(body)
    assert f"x-request-id: {problem['request_id']}".encode() in head
    assert service.client.get("/health").status_code == 200


def test_a_client_that_leaves_midway_is_no_error(service: Service) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: left-midway\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
    service.wait_until(lambda: service.log_lines_of("left-midway", "request"))
    assert service.log_lines_of("left-midway", "request")[0]["status"] == 499
    assert not [line for line in service.log_lines() if line["level"] == "error"]


def mutations(seed: int) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Bodies and headers that are wrong, or nearly right, in all sorts of ways."""
    chance = random.Random(seed)
    values: list[Any] = [
        None,
        True,
        -1,
        1e308,
        "x",
        "\x00",
        "💥",
        [],
        {},
        [[]],
        {"x": 1},
        2**70,
        0.1,
        "",
    ]
    media_types = ["application/json", "application/json", "text/json", "x", "multipart/form-data"]
    while True:
        content: Any = {"features": {"x": 1.5, "note": "n"}}
        for _ in range(chance.randint(0, 2)):
            target = chance.choice([content, content["features"]])
            if isinstance(target, dict):
                target[chance.choice(["features", "x", "note", "instances", ""])] = chance.choice(
                    values
                )
        body = bytearray(json.dumps(content, ensure_ascii=chance.random() < 0.5).encode())
        for _ in range(chance.choice([0, 0, 1, 5])):
            body[chance.randrange(len(body))] = chance.randrange(256)
        if chance.random() < 0.2:
            del body[chance.randrange(len(body)) :]
        if chance.random() < 0.1:
            body = bytearray(body.decode("latin-1").encode("utf-16"))
        yield bytes(body), {"Content-Type": chance.choice(media_types)}


def test_two_thousand_malformed_requests_break_nothing(service: Service) -> None:
    statuses = set()
    paths = [PREDICT, f"{PREDICT}/batch", "/v1/models/double/predict", "/v1/models/faulty/predict"]
    for number, (content, headers) in zip(range(2000), mutations(seed=7), strict=False):
        answer = service.client.post(paths[number % 4], content=content, headers=headers)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 415, 422), (content, headers, answer.text)
        if answer.status_code != 200:
            assert_problem(answer, answer.status_code)
    assert statuses == {200, 415, 422}
    assert service.client.post(PREDICT, json=GOOD).json()["prediction"] == {"y": 42}
    assert service.client.get("/ready").status_code == 200


def request_for(x: int, *more: bytes) -> bytes:
    body = b'{"features": {"x": %d}}' % x
    length = b"Content-Length: %d" % len(body)
    line, kind = b"POST /v1/predict HTTP/1.1", b"Content-Type: application/json"
    return b"\r\n".join((line, b"Host: x", kind, length, *more, b"", body))


# Answered by FastAPI.
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = PROBE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


def test_requests_in_a_pipeline_are_answered_in_order(service: Service) -> None:
    answers = exchange(service, request_for(1) + PROBE + request_for(2) + request_for(3) + LAST)
    found = re.findall(rb'"y":([0-9.]+)|"status":"(ok)"', answers)
    assert [y or ok for y, ok in found] == [b"2.0", b"ok", b"4.0", b"6.0", b"ok"]


@pytest.mark.parametrize("cached", [False, True], ids=["batches", "hits"])
def test_so_are_those_of_many_pipelines(start: Start, cached: bool) -> None:
    service = start(CACHE_ENABLED=str(cached).lower()).wait_for("/ready")
    [worker] = worker_pids(service)
    numbers = {n: range(20 * n, 20 * n + 20) for n in range(3 * TOGETHER)}
    if cached:
        for x in chain.from_iterable(numbers.values()):
            service.predict("double", x=x)
    with ExitStack() as stack:
        connections = {}
        for n in numbers:
            connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
            connections[n] = stack.enter_context(connection)
            # So it is accepted.
            connection.sendall(PROBE)
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")
        # All come in one turn of the event loop.
        os.kill(worker, signal.SIGSTOP)
        try:
            for n, connection in connections.items():
                *first, last = numbers[n]
                requests = b"".join(map(request_for, first))
                connection.sendall(requests + request_for(last, b"Connection: close"))
        finally:
            os.kill(worker, signal.SIGCONT)
        for n, connection in connections.items():
            answers = b"".join(iter(partial(connection.recv, 100_000), b""))
            found = re.findall(rb'"y":([0-9.]+)', answers)
            assert [float(y) for y in found] == [2 * x for x in numbers[n]]
    assert not [line for line in service.log_lines() if line["level"] == "error"]


def test_a_request_that_has_begun_to_come_keeps_its_header(service: Service) -> None:
    """While the one before it is answered."""
    body = json.dumps(GOOD).encode()
    head = b"POST /v1/predict HTTP/1.1\r\nContent-Type: application/json\r\nHost: x\r\n"
    length = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(head + length + head)
        first = connection.recv(10_000)
        connection.sendall(b"Connection: close\r\n" + length)
        second = b"".join(iter(lambda: connection.recv(1000), b""))
    for answer in (first, second):
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"prediction":{"y":42.0}' in answer


@pytest.mark.parametrize(("bad", "status"), [(1, 200), ("one", 422)])
def test_a_request_leaves_nothing_for_the_garbage_collector(
    start: Start, tmp_path: Path, bad: Any, status: int
) -> None:
    source = (FAKES / "double.py").read_text(encoding="utf-8")
    source = source.replace("self.factor * row.x", 'gc.get_stats()[0]["collections"]')
    source = source.replace("from pathlib", "import gc\nfrom pathlib", 1)
    (tmp_path / "double.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "double", factor_txt=b"2")
    # A cached answer would say what was the case when it was given first.
    places = {"PREDICTORS_DIR": tmp_path, "ARTIFACTS_DIR": tmp_path}
    service = start(**places, CACHE_ENABLED="false").wait_for("/ready")

    def collections_after(requests: int) -> float:
        for _ in range(requests):
            assert service.predict("double", x=bad).status_code == status
            answer = service.predict("double", x=1)
        number: float = answer.json()["prediction"]["y"]
        return number

    # What is kept for good, such as the labels of metrics, is there after the first ones.
    before = collections_after(50)
    assert collections_after(1500) == before
