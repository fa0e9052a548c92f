"""HTTP on one connection, by the protocol itself: in its order, in its time, and until its end."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, ClassVar

import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.server import ServerState

from app.api.json_route import _priority
from app.intake import LONGEST_S, SLICE_S, TOGETHER, Intake
from app.protocol import HEAD_BYTES, HEADERS, Exchange, Outbox, Protocol, headers_of

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


@pytest.fixture(autouse=True)
def intake(monkeypatch: pytest.MonkeyPatch) -> Intake:
    """One that no other event loop has used."""
    monkeypatch.setattr(Protocol, "intake", Intake())
    return Protocol.intake


class Connection(asyncio.Transport):
    def __init__(self, *, is_closed: bool = False) -> None:
        super().__init__()
        self.is_closed = is_closed
        self.is_paused = False
        self.sent = b""

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def write(self, data: Any) -> None:
        # As uvloop's do.
        if self.is_closed:
            raise RuntimeError("closed")
        self.sent += data

    def pause_reading(self) -> None:
        self.is_paused = True


Test = Callable[[Protocol, Connection], Coroutine[Any, Any, None]]


def test_who_asks_nothing_more_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not who asked again before that, whose answer takes long."""
    now = 1000.0
    monkeypatch.setattr("app.protocol.monotonic", lambda: now)
    may_answer = asyncio.Event()

    async def app(_: Any, __: Any, send: Any) -> None:
        await may_answer.wait()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def test() -> None:
        nonlocal now
        config = Config(app, http=Protocol, timeout_keep_alive=75)
        config.load()
        protocol = Protocol(config, ServerState(), {})
        connection = Connection()
        protocol.connection_made(connection)
        may_answer.set()
        for sent in (1, 2):
            protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.gather(*protocol.tasks)
            assert connection.sent.count(b"204 No Content") == sent
            now += 74
            protocol.timeout_keep_alive_handler()
            assert not connection.is_closed
        may_answer.clear()
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        now += 76
        protocol.timeout_keep_alive_handler()
        assert not connection.is_closed
        may_answer.set()
        await asyncio.gather(*protocol.tasks)
        now += 76
        protocol.timeout_keep_alive_handler()
        assert connection.is_closed
        protocol.connection_lost(None)
        assert protocol.timeout_keep_alive_task is None

    asyncio.run(test())


def test_a_request_right_behind_one_that_was_refused_is_no_idleness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("app.protocol.monotonic", lambda: now)

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    class App:
        refused = 0
        plain_paths: ClassVar = {b"/": "/"}

        def begin(self, exchange: Exchange, **_: bool) -> Coroutine[Any, Any, None] | None:
            if not self.refused:
                self.refused += exchange.respond(429, b"content-length: 0\r\n", b"")
                return None
            return wait_for_ever()

        async def __call__(self, _: Any, __: Any, ___: Any) -> None:
            raise AssertionError

    async def test() -> None:
        nonlocal now
        config = Config(App(), http=Protocol, timeout_keep_alive=75, proxy_headers=False)
        config.load()
        protocol = Protocol(config, ServerState(), {})
        connection = Connection()
        protocol.connection_made(connection)
        protocol.data_received(2 * b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(0)
        assert connection.sent.count(b"429") == 1
        assert len(protocol.tasks) == 1
        now += 76
        protocol.timeout_keep_alive_handler()
        assert not connection.is_closed
        protocol.connection_lost(None)

    asyncio.run(test())


def test_the_next_of_a_pipeline_knows_nothing_of_the_one_before() -> None:
    name: ContextVar[str] = ContextVar("name")
    seen: list[str] = []

    class App:
        plain_paths: ClassVar = {b"/": "/"}

        async def begin(self, exchange: Exchange, **_: bool) -> None:
            seen.append(name.get("nothing"))
            name.set("the one before")
            exchange.respond(200, b"content-length: 0\r\n", b"")

        async def __call__(self, _: Any, __: Any, ___: Any) -> None:
            raise AssertionError

    async def test() -> None:
        config = Config(App(), http=Protocol, proxy_headers=False)
        config.load()
        protocol = Protocol(config, ServerState(), {})
        protocol.connection_made(Connection())
        protocol.data_received(2 * b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0)
        assert seen == ["nothing", "nothing"]
        protocol.connection_lost(None)

    asyncio.run(test())


def test_an_answer_by_asgi_does_not_overtake_the_one_before_it() -> None:
    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    async def answer(exchange: Exchange) -> None:
        _, _, send = exchange.asgi
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    class App:
        begun = 0
        plain_paths: ClassVar = {b"/": "/"}

        def begin(self, exchange: Exchange, **_: bool) -> Coroutine[Any, Any, None] | None:
            self.begun += 1
            if self.begun == 2:
                exchange.respond(429, b"content-length: 0\r\n", b"")
                return None
            return answer(exchange) if self.begun == 3 else wait_for_ever()

        async def __call__(self, _: Any, __: Any, ___: Any) -> None:
            raise AssertionError

    async def test() -> None:
        config = Config(App(), http=Protocol, proxy_headers=False)
        config.load()
        other, protocol = (Protocol(config, ServerState(), {}) for _ in range(2))
        connection = Connection()
        other.connection_made(Connection())
        protocol.connection_made(connection)
        request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
        # So jobs begin before answers are sent in the next turn.
        other.data_received(request + b"\r\n")
        protocol.data_received(request + b"\r\n" + request + b"Connection: close\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0)
        assert re.findall(rb"HTTP/1.1 (\d+)", connection.sent) == [b"429", b"204"]
        other.connection_lost(None)
        protocol.connection_lost(None)

    asyncio.run(test())


def test_many_answers_do_not_wait_for_the_end_of_the_turn() -> None:
    async def test() -> None:
        connection, outbox = Connection(), Outbox()
        for _ in range(TOGETHER + 1):
            outbox.put(connection, b"answer;", asyncio.get_running_loop())
        assert connection.sent.count(b";") == TOGETHER
        await asyncio.sleep(0)
        assert connection.sent.count(b";") == TOGETHER + 1

    asyncio.run(test())


def test_who_leaves_does_not_take_the_answers_of_others_along() -> None:
    async def test() -> None:
        connections = [Connection(is_closed=number == 1) for number in range(3)]
        outbox = Outbox()
        for connection in connections:
            outbox.put(connection, b"answer", asyncio.get_running_loop())
        await asyncio.sleep(0)
        assert [connection.sent for connection in connections] == [b"answer", b"", b"answer"]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("lines", "priority"),
    [
        ([], 3),
        ([b"u=1"], 1),
        ([b"i, u=5;x"], 5),
        ([b"u=6", b"u=1, i"], 1),
        ([b"u=6, u=1"], 1),
        ([b"u=0", b"i"], 0),
        ([b"u=9"], 3),
    ],
)
def test_a_list_may_be_in_several_lines_and_the_last_counts(
    lines: list[bytes], priority: int
) -> None:
    headers = [(b"priority", line) for line in lines]
    assert _priority(headers_of([(b"host", b"x"), *headers, (b"host", b"y")])) == priority


class Connected:
    """One connection to an app, and a clock that stands still."""

    now = 0.0

    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("intake", "protocol"):
            monkeypatch.setattr(f"app.{module}.monotonic", lambda: self.now)

    def connect(self, answer: Callable[[Exchange], Coroutine[Any, Any, None]], test: Test) -> None:
        """With an app that goes by `answer`, and answers to a GET with nothing."""

        class App:
            plain_paths: ClassVar = {b"/": "/"}

            def begin(self, exchange: Exchange, **_: bool) -> Coroutine[Any, Any, None]:
                return answer(exchange)

            async def __call__(self, _: Any, __: Any, send: Any) -> None:
                await send({"type": "http.response.start", "status": 204})
                await send({"type": "http.response.body"})

        async def run() -> None:
            told: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, fault: told.append(fault))
            config = Config(App(), http=Protocol, proxy_headers=False, timeout_keep_alive=75)
            config.load()
            protocol, connection = Protocol(config, ServerState(), {}), Connection()
            protocol.connection_made(connection)
            await test(protocol, connection)
            protocol.connection_lost(None)
            assert not told

        asyncio.run(run())


class TestUnfinished(Connected):
    """Requests that do not get on, and who sends none."""

    HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
    CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    PIECE = b"x" * (HEAD_BYTES // 4)

    def run(self, test: Test) -> None:
        """With an app that answers when all of a body is there."""

        async def answer(exchange: Exchange) -> None:
            while exchange.more_body:
                await exchange.message_event.wait()
                exchange.message_event.clear()
            exchange.respond(200, b"content-length: 0\r\n", b"")

        self.connect(answer, test)

    async def send(self, protocol: Protocol, connection: Connection, *pieces: bytes) -> None:
        for piece in pieces:
            if not connection.is_closed:
                protocol.data_received(piece)
                # What has begun ends.
                for _ in range(3):
                    await asyncio.sleep(0)

    @pytest.mark.parametrize(
        "start", [b"POST /", HEAD + b"X: ", HEAD], ids=["url", "line", "lines"]
    )
    def test_a_head_without_end_is_refused(self, start: bytes) -> None:
        piece = b"x: y\r\n" * 50 if start is self.HEAD else self.PIECE

        async def test(protocol: Protocol, connection: Connection) -> None:
            await self.send(protocol, connection, start, *[piece] * 4)
            assert not connection.sent or start is self.HEAD
            await self.send(protocol, connection, piece)
            assert connection.sent.startswith(b"HTTP/1.1 431 Request Header Fields Too Large")
            assert connection.is_closed

        self.run(test)

    @pytest.mark.parametrize(("count", "status"), [(HEADERS, b"200 OK"), (HEADERS + 1, b"431 ")])
    def test_nor_may_one_have_many_headers(self, count: int, status: bytes) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            lines = b"x: y\r\n" * (count - 2)
            await self.send(protocol, connection, self.HEAD + lines + b"Content-Length: 0\r\n\r\n")
            assert connection.sent.startswith(b"HTTP/1.1 " + status)
            assert connection.sent.count(b"HTTP/1.1") == 1

        self.run(test)

    @pytest.mark.parametrize("end", [b"0\r\nX: ", b"1;"], ids=["trailer", "extension"])
    def test_a_body_without_end_that_is_no_body_is_dropped(self, end: bytes) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            pieces = [self.PIECE] * 5
            await self.send(protocol, connection, self.CHUNKED, b"1\r\nx\r\n" + end, *pieces)
            assert connection.is_closed
            assert not connection.sent

        self.run(test)

    def test_trailers_are_counted_though_there_is_an_answer(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            head = self.CHUNKED.replace(b"POST", b"GET")
            await self.send(protocol, connection, head)
            assert connection.sent.startswith(b"HTTP/1.1 204")
            await self.send(protocol, connection, b"0\r\n" + b"x: y\r\n" * (HEADERS + 1))
            assert connection.is_closed
            assert connection.sent.count(b"HTTP/1.1") == 1

        self.run(test)

    def test_a_body_in_pieces_may_be_as_long_as_it_likes(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            head = self.HEAD + b"Content-Length: %d\r\n\r\n" % (20 * len(self.PIECE))
            await self.send(protocol, connection, head, *[self.PIECE] * 20)
            assert connection.sent.startswith(b"HTTP/1.1 200")
            assert not connection.is_closed

        self.run(test)

    def test_that_of_the_next_is_not_answered_in_place_of_the_one_before(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four" + self.HEAD + b"X: ")
            for _ in range(5):
                protocol.data_received(self.PIECE)
            assert connection.is_closed
            assert not connection.sent

        self.run(test)

    def test_a_slow_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("app.protocol.HEAD_S", 0.0)

        async def test(protocol: Protocol, connection: Connection) -> None:
            await self.send(protocol, connection, self.HEAD)
            assert connection.is_closed
            assert connection.sent.startswith(b"HTTP/1.1 408 Request Timeout")

        self.run(test)

    def test_one_that_came_in_the_end_is_not_ended(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            await self.send(protocol, connection, self.HEAD)
            timer = protocol._head_timer
            assert timer
            await self.send(protocol, connection, b"Content-Length: 4\r\n\r\n")
            assert timer.cancelled()
            self.now += 100
            protocol.timeout_keep_alive_handler()
            assert not connection.is_closed
            await self.send(protocol, connection, b"four")
            assert connection.sent.startswith(b"HTTP/1.1 200")

        self.run(test)

    def test_an_answer_to_the_one_before_begins_no_idleness(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            await self.send(protocol, connection, REQUEST + b"four" + self.HEAD)
            assert connection.sent.startswith(b"HTTP/1.1 200")
            await self.send(protocol, connection, b"Content-Length: 4\r\n\r\n")
            self.now += 76
            protocol.timeout_keep_alive_handler()
            assert not connection.is_closed

        self.run(test)

    @pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"])
    def test_who_asks_nothing_at_all_is_left(self, sent: bytes) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            self.now += 74
            await self.send(protocol, connection, sent)
            protocol.timeout_keep_alive_handler()
            assert not connection.is_closed
            self.now += 2
            protocol.timeout_keep_alive_handler()
            assert connection.is_closed

        self.run(test)


class TestNoTime(Connected):
    """What comes when there is no more time in this turn of the event loop."""

    def use_up_the_time(self) -> None:
        Protocol.intake.has_time(self.now, asyncio.get_running_loop())
        self.now += LONGEST_S

    def run(self, test: Test) -> None:
        """With an app that answers with the body, and to a GET with nothing."""

        async def answer(exchange: Exchange) -> None:
            content = bytes(exchange.body)
            header = b"content-length: %d\r\nage: %d\r\n" % (
                len(content),
                round((self.now - exchange.received) / SLICE_S),
            )
            exchange.respond(200, header, content)

        async def later(protocol: Protocol, connection: Connection) -> None:
            self.use_up_the_time()
            await test(protocol, connection)

        self.connect(answer, later)

    def test_waits_for_the_next_turn_and_its_time_counts(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            assert not protocol.tasks
            self.now += 5 * SLICE_S
            await asyncio.sleep(0)
            assert connection.sent.endswith(b"age: 5\r\n\r\nfour")

        self.run(test)

    def test_a_probe_is_answered_first(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            other, probing = Protocol(protocol.config, ServerState(), {}), Connection()
            other.connection_made(probing)
            other.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert len(other.tasks) == 1
            assert not connection.sent
            await asyncio.gather(*other.tasks)
            assert b" 204 " in probing.sent
            other.connection_lost(None)

        self.run(test)

    def test_what_follows_comes_after_it(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST[:10])
            protocol.data_received(REQUEST[10:] + b"fo")
            protocol.data_received(b"ur" + REQUEST + b"more")
            for _ in range(5):
                await asyncio.sleep(0)
            assert re.findall(rb"\r\n\r\n(....)", connection.sent) == [b"four", b"more"]

        self.run(test)

    def test_a_body_that_comes_waits_for_its_turn_as_well(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            protocol.data_received(REQUEST + b"fo")
            self.now += LONGEST_S
            protocol.data_received(b"ur")
            assert protocol.exchange
            assert len(protocol.exchange.body) == 2
            assert not connection.sent
            await asyncio.sleep(0)

        self.run(test)

    def test_no_more_is_read_than_there_is_room_for(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            assert not connection.is_paused
            protocol.data_received(REQUEST * HIGH_WATER_LIMIT)
            assert connection.is_paused

        self.run(test)

    def test_nor_at_once(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST * HIGH_WATER_LIMIT)
            assert connection.is_paused

        self.run(test)

    def test_reading_goes_on_when_it_was_taken_in(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nX: ")
            protocol.data_received(b"x" * HIGH_WATER_LIMIT)
            assert connection.is_paused
            await asyncio.sleep(0)
            assert not connection.is_paused

        self.run(test)

    def test_who_leaves_is_not_asked_for(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            protocol.connection_lost(None)
            await asyncio.sleep(0)
            assert not protocol.tasks
            assert not connection.sent

        self.run(test)

    def test_is_no_idleness(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            protocol.data_received(REQUEST + b"four")
            await asyncio.sleep(0)
            assert connection.sent.endswith(b"four")
            self.use_up_the_time()
            protocol.data_received(REQUEST + b"more")
            self.now += 76
            protocol.timeout_keep_alive_handler()
            assert not connection.is_closed

        self.run(test)

    def test_is_no_idleness_when_the_one_before_is_answered(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            protocol._wait_for_request()
            self.now += 76
            protocol.timeout_keep_alive_handler()
            assert not connection.is_closed

        self.run(test)

    def test_what_cannot_be_read_ends_the_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: bytes) -> None:
            raise ValueError("x")

        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            monkeypatch.setattr(protocol, "_read", fail)
            with pytest.raises(ValueError, match="x"):
                protocol.take_in()
            assert connection.is_closed

        self.run(test)

    def test_is_not_lost_when_the_service_stops(self) -> None:
        async def test(protocol: Protocol, connection: Connection) -> None:
            protocol.data_received(REQUEST + b"four")
            protocol.shutdown()
            assert len(protocol.tasks) == 1
            assert not connection.is_closed
            await asyncio.sleep(0)

        self.run(test)
