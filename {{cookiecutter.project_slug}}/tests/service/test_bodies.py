"""Bodies: how large one may be, how long one may take to come, and what all may take together."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import BaseModel

from app.api.bodies import SMALL_BYTES, Bodies, NoRoom
from app.api.json_route import Call, Endpoint, JsonRoute, Rules
from app.api.keys import ApiKeys
from app.errors import BodyTimeout, DeadlineExceeded, ServiceError
from app.predictor import BaseFeatures
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


def test_a_head_without_end_is_refused(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Big: ")
        with pytest.raises(ConnectionError):
            connection.sendall(b"x" * 100_000_000)
    assert service.client.get("/health").status_code == 200


@pytest.mark.parametrize(("has_come", "error"), [(False, BodyTimeout), (True, DeadlineExceeded)])
def test_who_is_not_read_in_time_is_not_told_to_have_been_late(
    has_come: bool, error: type[ServiceError]
) -> None:
    async def test() -> None:
        model: Any = SimpleNamespace(admit=lambda *_: None, cache=None, metrics=None)
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


class Features(BaseFeatures):
    x: float


class Body(BaseModel):
    features: Features


class Chunks:
    """A body that comes when it is told to."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(self, number: int, *, more: bool) -> None:
        body = b"x" * number
        self.coming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self.coming.put_nowait({"type": "http.disconnect"})

    def read_by(self, bodies: Bodies) -> "asyncio.Task[bytes]":
        async def read() -> bytes:
            reader = asyncio.current_task()
            assert reader
            return await bodies.read(self.coming.get, reader, b"", monotonic() + 60)

        return asyncio.create_task(read())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_is_being_read_counts() -> None:
    async def test() -> None:
        bodies = Bodies(max_bytes=100_000, max_bytes_held=150_000)
        first, second, small = Chunks(), Chunks(), Chunks()
        reading = first.read_by(bodies)
        first.send(SMALL_BYTES, more=True)
        await settle()
        assert bodies.bytes_held == 0
        first.send(80_000, more=True)
        await settle()
        assert bodies.bytes_held == SMALL_BYTES + 80_000
        refused = second.read_by(bodies)
        second.send(40_000, more=True)
        await settle()
        second.send(40_000, more=True)
        with pytest.raises(NoRoom):
            await refused
        # What it had held is free again, and small ones are not asked.
        assert bodies.bytes_held == SMALL_BYTES + 80_000
        small.send(SMALL_BYTES, more=False)
        assert len(await small.read_by(bodies)) == SMALL_BYTES
        first.send(1, more=False)
        assert len(await reading) == SMALL_BYTES + 80_001
        # Until the answer is made.
        assert bodies.bytes_held == SMALL_BYTES + 80_001

    asyncio.run(test())


@pytest.mark.parametrize("ending", ["leaves", "cancelled", "too large"])
def test_who_is_not_read_to_the_end_holds_nothing(ending: str) -> None:
    async def test() -> None:
        bodies, chunks = Bodies(max_bytes=100_000, max_bytes_held=150_000), Chunks()
        reading = chunks.read_by(bodies)
        chunks.send(90_000, more=True)
        await settle()
        assert bodies.bytes_held == 90_000
        if ending == "leaves":
            chunks.leave()
        elif ending == "cancelled":
            reading.cancel()
        else:
            chunks.send(20_000, more=True)
        await asyncio.gather(reading, return_exceptions=True)
        assert bodies.bytes_held == 0

    asyncio.run(test())


class TestManyBytes:
    """There is room for one body of 90,000 bytes, and for many small ones."""

    @pytest.fixture
    def service(self, start: Start) -> Service:
        limits = {"MAX_BODY_BYTES": 100_000, "QUEUE_MAX_BYTES": 100_000}
        return start(CACHE_ENABLED=False, REQUEST_TIMEOUT_S=25, **limits).wait_for("/ready")

    @staticmethod
    def post(service: Service) -> httpx.Response:
        return service.client.post(PREDICT, content=large_body(90_000), headers=JSON)

    @staticmethod
    def ask_the_gate(connection: socket.socket, pipe: Path) -> None:
        content = json.dumps({"features": {"pipe": f"{pipe}"}})
        content = content[:-2].ljust(90_000) + content[-2:]
        head = (
            "POST /v1/models/gate/predict HTTP/1.1\r\nHost: x\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall((head + content).encode())

    def test_what_waits_for_the_model_counts(self, service: Service, pipe: Path) -> None:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            self.ask_the_gate(connection, pipe)
            # Open on both sides: the model is at work.
            with pipe.open("w") as gate:
                refused = self.post(service)
                assert "Too many bytes" in assert_problem(refused, 429)["detail"]
                assert int(refused.headers["retry-after"]) >= 1
                # It was not for the number of requests.
                assert service.predict("double", x=21).json()["prediction"] == {"y": 42}
                gate.write("go")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert self.post(service).status_code == 200
        metrics = service.client.get("/metrics").text
        [count] = re.findall(r"\ninference_rejected_total.*double.*queue_bytes.*} (.*)", metrics)
        assert float(count) == 1

    def test_who_leaves_makes_room(self, service: Service, pipe: Path) -> None:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            self.ask_the_gate(connection, pipe)
            with pipe.open("w"):
                assert self.post(service).status_code == 429
                connection.close()
                service.wait_until(lambda: self.post(service).status_code == 200)

    def test_so_does_who_is_refused(self, service: Service) -> None:
        for content, status in ((large_body(90_000)[:-1], 422), (large_body(200_000), 413)):
            answer = service.client.post(PREDICT, content=content, headers=JSON)
            assert_problem(answer, status)
            chunked = service.client.post(PREDICT, content=iter([content.encode()]), headers=JSON)
            assert_problem(chunked, status)
        assert self.post(service).status_code == 200


def large_body(size: int) -> str:
    return '{"features": {"x": 1}}'.ljust(size - 1).replace("}}", "}") + "}"
