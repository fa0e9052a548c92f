"""Bodies: how large one may be, how long one may take to come, and what all may take together."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import BaseModel

from app.api.bodies import Bodies
from app.api.json_route import Call, Endpoint, JsonRoute, Rules
from app.api.keys import ApiKeys
from app.errors import BodyTimeout, DeadlineExceeded, ServiceError
from tests.service.server import Service, Start, assert_problem

JSON = {"Content-Type": "application/json"}
PREDICT = "/v1/predict"


class TestTooLarge:
    def test_a_declared_length_is_refused_unread(self, service: Service) -> None:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 999999999999\r\n\r\n{"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")

    def test_a_client_that_sends_all_of_it_first_sees_the_answer(self, service: Service) -> None:
        answer = service.client.post(PREDICT, content=b"x" * 3_000_000, headers=JSON)
        assert "over 20000 bytes" in assert_problem(answer, 413)["detail"]

    def test_chunks_are_counted(self, service: Service) -> None:
        def chunks() -> Iterator[bytes]:
            for _ in range(300):
                yield b"x" * 1000

        answer = service.client.post(PREDICT, content=chunks(), headers=JSON)
        assert_problem(answer, 413)

    def test_the_largest_body_is_answered(self, service: Service) -> None:
        shell = json.dumps({"features": {"x": 1, "note": ""}})
        content = shell.replace('""', f'"{"n" * (20_000 - len(shell))}"')
        assert len(content) == 20_000
        assert service.client.post(PREDICT, content=content, headers=JSON).status_code == 200
        assert_problem(service.client.post(PREDICT, content=content + " ", headers=JSON), 413)

    def test_too_many_instances(self, service: Service) -> None:
        rows = [{"x": 1}] * 10
        path = f"{PREDICT}/batch"
        assert service.client.post(path, json={"instances": rows}).status_code == 200
        answer = service.client.post(path, json={"instances": [*rows, {"x": 1}]})
        assert "More than 10 instances" in assert_problem(answer, 413)["detail"]


def test_a_body_that_never_comes_is_not_waited_for(start: Start) -> None:
    service = start(REQUEST_TIMEOUT_S=0.2).wait_for("/ready")
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(("has_come", "error"), [(False, BodyTimeout), (True, DeadlineExceeded)])
def test_who_is_not_read_in_time_is_not_told_to_have_been_late(
    has_come: bool, error: type[ServiceError]
) -> None:
    async def test() -> None:
        model: Any = SimpleNamespace(admit=lambda _: None, cache=None, metrics=None)
        endpoint = Endpoint(Body, Body, lambda _: [], lambda *_: b"", "", {})
        route = JsonRoute("/predict", endpoint, model, Rules(0.01, ApiKeys([]), Bodies(100, 100)))
        exchange: Any = SimpleNamespace(
            take_content=lambda _: None,
            asgi=({}, asyncio.Event().wait, None),
            job=asyncio.current_task(),
            has_unread=has_come,
        )
        call = Call("1", monotonic(), {b"content-type": b"application/json"}, exchange)
        with pytest.raises(error):
            await route.answer(call, None)

    asyncio.run(test())


class Body(BaseModel):
    pass


class TestManyBytes:
    """There is room for one body of 90,000 bytes, and for many small ones."""

    @pytest.fixture
    def service(self, start: Start) -> Service:
        limits = {"MAX_BODY_BYTES": 100_000, "QUEUE_MAX_BYTES": 100_000}
        return start(CACHE_ENABLED=False, REQUEST_TIMEOUT_S=25, **limits).wait_for("/ready")

    @staticmethod
    def post(service: Service, model: str = "double") -> httpx.Response:
        path = f"/v1/models/{model}/predict"
        return service.client.post(path, content=large_body(90_000), headers=JSON)

    def wait_for(self, service: Service, status: int) -> httpx.Response:
        answers: list[httpx.Response] = []

        def is_so() -> bool:
            answers.append(self.post(service))
            return answers[-1].status_code == status

        service.wait_until(is_so)
        return answers[-1]

    def test_what_is_being_read_counts(self, service: Service) -> None:
        with half_sent(service, large_body(90_000)) as (connection, rest):
            refused = self.wait_for(service, 429)
            assert "Too many bytes" in assert_problem(refused, 429)["detail"]
            assert int(refused.headers["retry-after"]) >= 1
            # It was not for the number of requests, nor did the connection suffer.
            assert service.predict("double", x=21).json()["prediction"] == {"y": 42}
            connection.sendall(rest)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert self.post(service).status_code == 200
        metrics = service.client.get("/metrics").text
        [count] = re.findall(r"\ninference_rejected_total.*double.*queue_bytes.*} (.*)", metrics)
        assert float(count) >= 1

    def test_what_waits_for_the_model_counts(self, service: Service, pipe: Path) -> None:
        content = json.dumps({"features": {"pipe": f"{pipe}"}})
        content = content[:-2].ljust(90_000) + content[-2:]
        head = head_of("/v1/models/gate/predict", content)
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall((head + content).encode())
            self.wait_for(service, 429)
            pipe.write_text("go")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert self.post(service).status_code == 200

    def test_who_leaves_makes_room(self, service: Service) -> None:
        with half_sent(service, large_body(90_000)):
            self.wait_for(service, 429)
        self.wait_for(service, 200)

    def test_so_does_who_is_refused(self, service: Service) -> None:
        for content, status in ((large_body(90_000)[:-1], 422), (large_body(200_000), 413)):
            answer = service.client.post(PREDICT, content=content, headers=JSON)
            assert_problem(answer, status)
            chunked = service.client.post(PREDICT, content=iter([content.encode()]), headers=JSON)
            assert_problem(chunked, status)
        assert self.post(service).status_code == 200


def large_body(size: int) -> str:
    return '{"features": {"x": 1}}'.ljust(size - 1).replace("}}", "}") + "}"


def head_of(path: str, content: str) -> str:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )


@contextmanager
def half_sent(service: Service, content: str) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection that lacks a byte of its body, and that byte."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall((head_of(PREDICT, content) + content[:-1]).encode())
        yield connection, content[-1:].encode()
