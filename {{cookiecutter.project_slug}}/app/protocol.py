"""uvicorn's HTTP protocol, with problem details for what is not HTTP."""

import asyncio
import re
from contextvars import Context
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import Any, ClassVar
from uuid import uuid4

from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.errors import PROBLEM_MEDIA_TYPE, Problem
from app.jobs import Inbox, Job

H2C_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class Outbox:
    """Answers that are sent together at the end of a turn of the event loop.

    A client that gets its answer sends the next request at once. If all who share a batch get
    theirs at once, their next requests are there at once, too, and share the next batch.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.send)
        self._waiting.append((transport, data))

    def send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            self.send_at_once(transport, data)

    def send_at_once(self, transport: asyncio.Transport, data: bytes) -> None:
        # The write would raise, and those after it would never be answered.
        if not transport.is_closing():
            transport.write(data)


class Exchange:
    """A request under way, for whoever can do more with it than ASGI allows."""

    __slots__ = ("_cycle", "_protocol", "is_waiting", "job")

    def __init__(self, protocol: "Protocol", cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.job: Job | None = None
        """What answers it."""

        self.is_waiting = False
        """Whether the job is to be cancelled when the client leaves."""

    @property
    def asgi(self) -> tuple[Scope, Receive, Send]:
        """What an ASGI application is called with."""
        cycle: Any = self._cycle
        return cycle.scope, cycle.receive, cycle.send

    @property
    def is_alone(self) -> bool:
        """Whether no other request is under way, or was received in this turn of the loop. Holds
        once the request has its job."""
        return len(self._protocol.tasks) == 1

    @property
    def may_respond(self) -> bool:
        """Whether `respond` would send an answer."""
        cycle = self._cycle
        is_open = cycle.keep_alive and not self._protocol.flow.write_paused
        return is_open and not cycle.response_started

    @property
    def has_left(self) -> bool:
        """Whether the client has."""
        return self._cycle.disconnected

    def take_content(self, max_bytes: int) -> bytes | None:
        """The body, if all of it is there, is not too long, and the client is there, too."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or len(cycle.body) > max_bytes:
            return None
        content, cycle.body = bytes(cycle.body), bytearray()
        # Who does not read does not notice that the client leaves.
        self._protocol.flow.resume_reading()
        return content

    def leave(self) -> None:
        """The client has left. uvicorn tells the last request of a pipeline alone."""
        if self._cycle.response_complete:
            return
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self.job and self.is_waiting:
            self.job.cancel()

    def respond(self, status: int, headers: bytes, content: bytes) -> bool:
        """Send a whole answer; `headers` are lines. False: it has to go the usual way.

        Past ASGI an answer takes one system call in place of two, each of which wakes the client
        up, and its headers are not checked one by one.
        """
        cycle, protocol = self._cycle, self._protocol
        if not self.may_respond:
            return False
        if not cycle.disconnected:
            cycle.response_started = cycle.response_complete = True
            usual = [b"%b: %b\r\n" % header for header in protocol.server_state.default_headers]
            data = b"".join((STATUS_LINE[status], *usual, headers, b"\r\n", content))
            if self.is_alone:
                protocol.outbox.send()
                protocol.outbox.send_at_once(protocol.transport, data)
            else:
                protocol.outbox.put(protocol.transport, data)
            cycle.message_event.set()
            # The next request of a pipeline begins in the next turn, so after the outbox.
            cycle.on_response()
            self._forget()
        return True

    def _forget(self) -> None:
        """Free what uvicorn keeps until the connection's next request, while it is in the CPU's
        cache: with hundreds of connections it is not, when that comes."""
        cycle, protocol = self._cycle, self._protocol
        cycle.scope = None  # type: ignore[assignment]
        cycle.body = bytearray()
        if protocol.cycle is cycle:
            protocol.scope = None  # type: ignore[assignment]
            # Its body may still come, and bring trailers, which are headers to the parser.
            protocol.headers = []


def _nothing() -> None:
    pass


class Protocol(HttpToolsProtocol):
    inbox: ClassVar = Inbox()
    outbox: ClassVar = Outbox()
    exchange: Exchange | None = None
    is_in_message = False
    """Whether the parser has seen the begin of a request and not its end."""

    _idle_since: float | None = None
    """When the last request was answered, by `monotonic`, if none has come since."""

    def on_message_begin(self) -> None:
        self.is_in_message = True
        self._idle_since = None
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        path = getattr(self.app, "plain_paths", {}).get(self.url)
        if path is None or not self._is_plain_post():
            super().on_headers_complete()
            return
        # What uvicorn would find out about any request takes 2 us of the 45 of this one.
        scope = self.scope
        scope["method"], scope["path"], scope["raw_path"] = "POST", path, self.url
        scope["query_string"] = b""
        self.cycle = RequestResponseCycle(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            expect_100_continue=False,
            keep_alive=self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def _is_plain_post(self) -> bool:
        """Whether it is a POST by HTTP/1.1, with nothing to it that comes once in a while."""
        parser, before = self.parser, self.cycle
        is_plain = parser.get_method() == b"POST" and parser.get_http_version() == "1.1"
        is_special = self.expect_100_continue or parser.should_upgrade() or self.limit_concurrency
        is_next = before is None or before.response_complete
        return is_plain and not is_special and is_next

    def on_message_complete(self) -> None:
        self.is_in_message = False
        super().on_message_complete()
        if self.cycle.response_complete and self._idle_since is None:
            # It was answered before its body was there, which ended the wait for the next one.
            self._wait_for_request()

    def on_response_complete(self) -> None:
        # As uvicorn's, whose timer is made and cancelled for each request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait_for_request()

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
        left = self._idle_since + self.timeout_keep_alive - monotonic()
        if left > 0:
            self._look_again_in(left)
        else:
            self.transport.close()

    def _unset_keepalive_if_required(self) -> None:
        """Called by uvicorn when there is data, or the connection has ended."""
        self._idle_since = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self.exchange = exchange = Exchange(self, cycle)
        begin = getattr(app, "begin", None)  # of app.api.middleware
        # Of those that waited in a pipeline, each refusal would begin the next one within itself.
        may_refuse = not self.pipeline and exchange.may_respond
        answering = begin(exchange, may_refuse=may_refuse) if begin else None
        if answering:
            exchange.job = job = Job(answering, partial(self._ended, exchange, cycle))
            # uvicorn waits for them when it stops, and cancels them after a while.
            self.tasks.add(job)  # type: ignore[arg-type]
            self.inbox.put(job)
        elif cycle.response_complete:
            cycle.on_response = _nothing
        else:
            super()._start_asgi_task(cycle, app)

    def _ended(self, exchange: Exchange, cycle: RequestResponseCycle, job: Job) -> None:
        self.tasks.discard(job)
        # They know the protocol, which knows them.
        cycle.on_response, exchange.job = _nothing, None
        if not (cycle.response_complete or cycle.disconnected):
            self.transport.close()

    def shutdown(self) -> None:
        self.outbox.send()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        # Java's HttpClient offers HTTP/2 with every request over plain HTTP. The parser would
        # stop after the header and lose the body (Kludex/uvicorn#2722); the offer may be ignored
        # (RFC 9110, section 7.8).
        if not self.is_in_message and b"h2c" in data:
            head, end, body = data.partition(b"\r\n\r\n")
            data = H2C_OFFER.sub(b"", head + end[:2]) + end[2:] + body
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self.exchange = self.exchange, None
        super().connection_lost(exc)
        if self.timeout_keep_alive_task:
            self.timeout_keep_alive_task.cancel()
        if exchange:
            exchange.leave()

    def send_400_response(self, msg: str) -> None:
        self.outbox.send()
        request_id = uuid4().hex
        body = Problem(
            title=HTTPStatus.BAD_REQUEST.phrase,
            status=HTTPStatus.BAD_REQUEST,
            detail=msg,
            request_id=request_id,
        ).model_dump_json(exclude_none=True)
        head = [
            "HTTP/1.1 400 Bad Request",
            f"content-type: {PROBLEM_MEDIA_TYPE}",
            f"content-length: {len(body)}",
            f"x-request-id: {request_id}",
            "connection: close",
        ]
        self.transport.write(("\r\n".join(head) + "\r\n\r\n" + body).encode())
        self.transport.close()
