"""uvicorn's HTTP protocol, with problem details for what is not HTTP."""

import asyncio
import re
from functools import partial
from http import HTTPStatus
from typing import ClassVar
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.errors import PROBLEM_MEDIA_TYPE, Problem

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
            transport.write(data)


class Protocol(HttpToolsProtocol):
    outbox: ClassVar = Outbox()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # Extensions of ours to ASGI; see app.api.
        self.scope["state"]["respond"] = partial(self._respond, self.cycle)
        self.scope["state"]["requests"] = self.tasks

    def _respond(
        self, cycle: RequestResponseCycle, status: int, headers: bytes, content: bytes
    ) -> bool:
        """Send a whole answer; `headers` are lines. False: it has to go the usual way.

        Past ASGI an answer takes one system call in place of two, each of which wakes the client
        up, and its headers are not checked one by one.
        """
        if cycle.response_started or not cycle.keep_alive or self.flow.write_paused:
            return False
        if not cycle.disconnected:
            cycle.response_started = cycle.response_complete = True
            usual = [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
            parts = (STATUS_LINE[status], *usual, headers, b"\r\n", content)
            if len(self.tasks) == 1:
                self.transport.write(b"".join(parts))
            else:
                self.outbox.put(self.transport, b"".join(parts))
            cycle.message_event.set()
            # The next request of a pipeline begins in the next turn, so after the outbox.
            cycle.on_response()
        return True

    def shutdown(self) -> None:
        self.outbox.send()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        # Java's HttpClient offers HTTP/2 with every request over plain HTTP. The parser would
        # stop after the header and lose the body (Kludex/uvicorn#2722); the offer may be ignored
        # (RFC 9110, section 7.8).
        begins_request = self.cycle is None or self.cycle.response_complete
        if begins_request and b"h2c" in data:
            head, end, body = data.partition(b"\r\n\r\n")
            data = H2C_OFFER.sub(b"", head + end[:2]) + end[2:] + body
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        cycle = self.cycle
        super().connection_lost(exc)
        if cycle and not cycle.response_complete:
            # Work for a client that has left need not be done; see app.api.json_route.
            leave = cycle.scope["state"].get("on_disconnect")
            if leave:
                leave()

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
