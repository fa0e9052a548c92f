"""uvicorn's HTTP protocol, with problem details for what is not HTTP."""

import asyncio
import re
from collections.abc import Mapping
from contextvars import Context
from http import HTTPStatus
from time import monotonic
from typing import Any, ClassVar
from uuid import uuid4

from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.errors import PROBLEM_MEDIA_TYPE, problem_of
from app.intake import TOGETHER, Intake
from app.jobs import Job

Asgi = tuple[Scope, Receive, Send]
"""What an ASGI application is called with."""

NO_HEADERS: Mapping[bytes, bytes] = {}

H2C_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


HEAD_BYTES = 64 * 1024
"""How much of a request may come without that anything of its body comes: its head, or trailers. To
this is added what one read brings, 256 KiB at the most. The parser copies all of a line for each
piece of it, so that a few endless ones would take a whole core."""

HEADERS = 100
"""The most in a request, as gunicorn has it."""

TOO_LARGE = f"The head is larger than {HEAD_BYTES} bytes, or has more than {HEADERS} headers."

HEAD_S = 10.0
"""How long a head may take to come, once it has begun. Bodies have the request's time-out."""

LISTS = (b"cache-control", b"priority")
"""Headers that a prediction looks at and that may be sent in several lines."""


def headers_of(lines: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """By name; of one that is repeated the last, but all of a list (RFC 9110, section 5.3)."""
    headers = dict(lines)
    if len(headers) < len(lines):
        for name in LISTS:
            if name in headers:
                headers[name] = b", ".join([value for its, value in lines if its == name])
    return headers


class Outbox:
    """Answers that are sent together at the end of a turn of the event loop, or when there are
    enough.

    A client that gets its answer sends the next request at once. If all who share a batch get
    theirs at once, their next requests are there at once, too, and share the next batch.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []

    def put(
        self, transport: asyncio.Transport, data: bytes, loop: asyncio.AbstractEventLoop
    ) -> None:
        if not self._waiting:
            loop.call_soon(self.send)
        self._waiting.append((transport, data))
        if len(self._waiting) >= TOGETHER:
            self.send()

    def send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            self.send_at_once(transport, data)

    def send_at_once(self, transport: asyncio.Transport, data: bytes) -> None:
        # The write would raise, and those after it would never be answered.
        if not transport.is_closing():
            transport.write(data)


class Exchange(RequestResponseCycle):
    """A POST to a prediction route, under way: uvicorn's, which can do more than ASGI allows.

    What nearly all of them have in common is an attribute of the class, until it changes: to make
    one takes a third of the time.
    """

    access_log = False
    disconnected = response_started = response_complete = False
    more_body = True
    chunked_encoding = None
    expected_content_length = 0

    scope: Any = {"type": "http", "method": "POST"}  # noqa: RUF012
    """As much of ASGI's as it takes to send an answer."""

    job: Job | None = None
    """What answers it."""

    is_waiting = False
    """Whether the job is to be cancelled when the client leaves."""

    _event: asyncio.Event | None = None

    def __init__(
        self, protocol: "Protocol", path: str, headers: Mapping[bytes, bytes], *, keep_alive: bool
    ) -> None:
        self._protocol = protocol
        self.path = path
        self.headers = headers
        """By name in lower case; of one that is repeated, the last."""

        self.transport = protocol.transport
        self.flow = protocol.flow
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.received = protocol.received
        """When it came, by `monotonic`; of the next one of a pipeline, when its turn came."""

        self.body: Any = b""

    @property
    def asgi(self) -> Asgi:
        """For what cannot go the short way."""
        receive: Any = self.receive
        send: Any = self.send
        return self.scope, receive, send

    @property
    def default_headers(self) -> Any:  # type: ignore[override]
        return self._protocol.server_state.default_headers

    @property
    def message_event(self) -> Any:  # type: ignore[override]
        """Whether there is something to receive. Mostly nobody waits for that."""
        if self._event is None:
            self._event = asyncio.Event()
            if self.body or self.disconnected or not self.more_body:
                self._event.set()
        return self._event

    @property
    def scheme(self) -> str:
        return self._protocol.scheme or "http"

    @property
    def is_alone(self) -> bool:
        """Whether no other request is under way, or was received in this turn of the loop. Holds
        once the request has its job."""
        return len(self._protocol.tasks) == 1

    @property
    def may_respond(self) -> bool:
        """Whether `respond` would send an answer."""
        return self.keep_alive and not (self.response_started or self.flow.write_paused)

    @property
    def has_unread(self) -> bool:
        """Whether more of it has come than was read."""
        return bool(self._protocol.unread)

    def wake_receiver(self) -> None:
        """There is something to receive."""
        if self._event:
            self._event.set()

    def take_content(self, max_bytes: int) -> bytes | None:
        """The body, if all of it is there, is not too long, and the client is there, too."""
        if self.more_body or self.disconnected or len(self.body) > max_bytes:
            return None
        content, self.body = bytes(self.body), b""
        # Who does not read does not notice that the client leaves.
        self.flow.resume_reading()
        return content

    def leave(self) -> None:
        """The client has left. uvicorn tells the last request of a pipeline alone."""
        if self.response_complete:
            return
        self.disconnected = True
        self.wake_receiver()
        if self.job and self.is_waiting:
            self.job.cancel()

    def respond(self, status: int, headers: bytes, content: bytes) -> bool:
        """Send a whole answer; `headers` are lines. False: it has to go the usual way.

        Past ASGI an answer takes one system call in place of two, each of which wakes the client
        up, and its headers are not checked one by one.
        """
        if not self.may_respond:
            return False
        if self.disconnected:
            return True
        self.response_started = self.response_complete = True
        protocol = self._protocol
        usual = protocol.usual_header_lines()
        data = b"".join((STATUS_LINE[status], usual, headers, b"\r\n", content))
        if len(protocol.tasks) == 1:
            protocol.outbox.send()
            protocol.outbox.send_at_once(self.transport, data)
        else:
            protocol.outbox.put(self.transport, data, protocol.loop)
        # The next request of a pipeline begins in the next turn, so after the outbox.
        protocol.on_response_complete()
        # Freed while they are in the CPU's cache: with hundreds of connections they are not when
        # the next request comes.
        self.body, self.headers = b"", NO_HEADERS
        if protocol.cycle is self and (self.more_body or not protocol.is_in_message):
            # Its body may still come, and bring trailers, which are headers to the parser. But if
            # the next request has begun to come, they are that one's.
            protocol.headers = []
        return True

    async def receive(self) -> Any:
        if self.waiting_for_100_continue:
            self._protocol.outbox.send()
        return await super().receive()

    async def send(self, message: Any) -> None:
        # What goes by ASGI is not to overtake the answer before it, nor to close upon it.
        self._protocol.outbox.send()
        await super().send(message)

    def on_response(self) -> None:
        self._protocol.on_response_complete()

    def end(self, job: Job) -> None:
        """The job has."""
        self._protocol.tasks.discard(job)
        # It knows this.
        self.job = None
        if not (self.response_complete or self.disconnected):
            self.transport.close()


class Protocol(HttpToolsProtocol):
    intake: ClassVar = Intake()
    outbox: ClassVar = Outbox()
    exchange: Exchange | None = None
    """The one that was begun last."""

    is_in_message = False
    """Whether the parser has seen the begin of a request and not its end."""

    _is_in_head = False
    """Whether it has seen the begin of a request and not the end of its head."""

    _gets_on = False
    """Whether a request has begun in this read, or part of a body has come."""

    _bytes_without_body = 0
    """In the reads since."""

    _head_timer: asyncio.TimerHandle | None = None
    """Of a head that did not come in one piece."""

    received = 0.0
    """When what is being read has come, or the first of it, by `monotonic`."""

    unread = b""
    """What has come and waits to be taken in."""

    _idle_since: float | None = None
    """When the last request was answered, by `monotonic`, if none has come since."""

    _usual: ClassVar[tuple[object, bytes]] = (None, b"")

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Of app.api.middleware.
        self._plain_paths: Mapping[bytes, str] = getattr(self.app, "plain_paths", {})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.intake.hurry(monotonic())
        self._wait_for_request()

    def usual_header_lines(self) -> bytes:
        """Those of every answer, which change once a second."""
        headers = self.server_state.default_headers
        made_of, lines = Protocol._usual
        if made_of is not headers:
            lines = b"".join([b"%b: %b\r\n" % header for header in headers])
            Protocol._usual = headers, lines
        return lines

    def on_message_begin(self) -> None:
        self.is_in_message = self._is_in_head = self._gets_on = True
        self._idle_since = None
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if len(self.headers) > HEADERS:
            # To uvicorn, by way of the parser, it is no HTTP: see send_400_response.
            raise ValueError
        self._is_in_head = False
        # The answer to the one before may have come in between.
        self._idle_since = None
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None
        headers = headers_of(self.headers)
        expected = headers.get(b"expect")
        self.expect_100_continue = expected is not None and expected.lower() == b"100-continue"
        path, parser = self._plain_paths.get(self.url), self.parser
        if path is None and b"?" in self.url:
            # They take no parameters, but callers may add a key or a version.
            path = self._plain_paths.get(self.url.partition(b"?")[0])
        if path is None or parser.get_method() != b"POST":
            self._begin_usual()
            return
        before = self.cycle
        keep_alive = parser.should_keep_alive() and parser.get_http_version() != "1.0"
        self.cycle = exchange = Exchange(self, path, headers, keep_alive=keep_alive)
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:
            # They are answered one after the other.
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _begin_usual(self) -> None:
        url, headers = self.url, self.headers
        expect_100_continue = self.expect_100_continue
        # It makes the scope, which predictions do without: 1 us of the 45 that they take.
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect_100_continue
        self.headers += headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._gets_on = True
        cycle = self.cycle
        if not isinstance(cycle, Exchange):
            super().on_body(body)
        elif not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.wake_receiver()

    def on_message_complete(self) -> None:
        self.is_in_message = False
        cycle = self.cycle
        if not isinstance(cycle, Exchange):
            super().on_message_complete()
        elif not cycle.response_complete:
            cycle.more_body = False
            cycle.wake_receiver()
        if cycle.response_complete:
            # It was answered before its body was there, which ended the wait for the next one.
            self._wait_for_request()

    def on_response_complete(self) -> None:
        # As uvicorn's, whose timer is made and cancelled for each request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            # Not in the context of the one that has its answer.
            Context().run(self._start_next, *self.pipeline.pop())
        else:
            self._wait_for_request()

    def _start_next(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not isinstance(cycle, Exchange):
            super()._start_asgi_task(cycle, app)
            return
        cycle.received = monotonic()
        if job := self._job_for(cycle, app):
            # Within the job before it, it would be answered before that, and a long pipeline as a
            # whole in one turn of the loop.
            self.loop.call_soon(self.intake.put, job, self.loop)

    def _wait_for_request(self) -> None:
        self._idle_since = monotonic()
        if not self.timeout_keep_alive_task:
            self._look_again_in(self.timeout_keep_alive)

    def _look_again_in(self, seconds: float) -> None:
        # Not in the context of the request that happened to be the first.
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler, context=Context()
        )

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        left: float = self.timeout_keep_alive
        if not self.unread:
            left += self._idle_since - monotonic()
        if left > 0:
            self._look_again_in(left)
        else:
            self.transport.close()

    def _unset_keepalive_if_required(self) -> None:
        """Called by uvicorn when there is data, of which only a request ends the wait for one, or
        the connection has ended."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not isinstance(cycle, Exchange):
            super()._start_asgi_task(cycle, app)
        elif job := self._job_for(cycle, app):
            self.intake.put(job, self.loop)

    def _job_for(self, cycle: Exchange, app: ASGI3Application) -> Job | None:
        """What is to answer it, unless it was refused."""
        self.exchange = cycle
        # Of those that waited in a pipeline, each refusal would begin the next one within itself.
        may_refuse = not self.pipeline and cycle.may_respond
        begin = app.begin  # type: ignore[attr-defined]  # of app.api.middleware
        answering = begin(cycle, may_refuse=may_refuse)
        if not answering:
            return None
        cycle.job = job = Job(answering, cycle.end)
        # uvicorn waits for them when it stops, and cancels them after a while.
        self.tasks.add(job)  # type: ignore[arg-type]
        return job

    def shutdown(self) -> None:
        self.take_in()
        self.outbox.send()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        if not self.unread and (self.intake.has_time(now, self.loop) or self._is_urgent(data)):
            self.received = now
            self._read(data)
            return
        if not self.unread:
            self.received = now
            self.intake.leave(self.take_in)
        self.unread += data
        if len(self.unread) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def _is_urgent(self, data: bytes) -> bool:
        """Whether it can be no prediction, but a probe or a scrape."""
        return not (self.is_in_message or data.startswith(b"POST"))

    def take_in(self) -> None:
        """Read what was left, if the connection is still there."""
        data, self.unread = self.unread, b""
        if data and self.parser:
            self.flow.resume_reading()
            try:
                self._read(data)
            except BaseException:
                # As uvloop does, if it is told of data.
                self.transport.abort()
                raise

    def _read(self, data: bytes) -> None:
        # Java's HttpClient offers HTTP/2 with every request over plain HTTP. The parser would
        # stop after the header and lose the body (Kludex/uvicorn#2722); the offer may be ignored
        # (RFC 9110, section 7.8).
        # The body may be large, and would take as long to look through as a small model.
        if not self.is_in_message and data.find(b"h2c", 0, data.find(b"\r\n\r\n")) > 0:
            head, end, body = data.partition(b"\r\n\r\n")
            data = H2C_OFFER.sub(b"", head + end[:2]) + end[2:] + body
        super().data_received(data)
        if self.is_in_message and not self.transport.is_closing():
            self._bound(len(data))

    def _bound(self, read_bytes: int) -> None:
        """Once more of a request has come, and not its end."""
        self._bytes_without_body = 0 if self._gets_on else self._bytes_without_body + read_bytes
        self._gets_on = False
        if self._bytes_without_body > HEAD_BYTES or len(self.headers) > HEADERS:
            self._give_up(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, TOO_LARGE)
        elif self._is_in_head and not self._head_timer:
            late = HTTPStatus.REQUEST_TIMEOUT, f"The head did not come within {HEAD_S:.0f} s."
            self._head_timer = self.loop.call_later(HEAD_S, self._give_up, *late, context=Context())

    def _give_up(self, status: HTTPStatus, why: str) -> None:
        is_next = self.cycle is None or self.cycle.response_complete
        if self._is_in_head and is_next:
            self._refuse(status, why)
        else:
            # To say so would answer another request, or the same one twice.
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.timeout_keep_alive_task, self._head_timer):
            if timer:
                timer.cancel()
        if self.exchange:
            self.exchange.leave()
        # They know this.
        self.exchange = self.cycle = None  # type: ignore[assignment]
        self.pipeline.clear()

    def send_400_response(self, msg: str) -> None:
        if self._is_in_head and len(self.headers) > HEADERS:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, TOO_LARGE)
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.outbox.send()
        request_id = uuid4().hex
        body = problem_of(status, why, request_id).model_dump_json(exclude_none=True).encode()
        head = [
            f"HTTP/1.1 {status} {status.phrase}",
            f"content-type: {PROBLEM_MEDIA_TYPE}",
            f"content-length: {len(body)}",
            f"x-request-id: {request_id}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.close()
