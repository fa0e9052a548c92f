"""uvicorn's HTTP protocol, with problem details for what is not HTTP."""

import asyncio
import re
from http import HTTPStatus
from typing import Any, cast
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import PROBLEM_MEDIA_TYPE, Problem

H2C_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class JoiningTransport:
    """Sends what is written in one turn of the event loop at once.

    uvicorn writes the header of an answer and then its body, each with a system call that wakes
    the client up.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self._send)
        self._written.append(data)

    def _send(self) -> None:
        if self._written:
            data, self._written = b"".join(self._written), []
            self._transport.write(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        joining = JoiningTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, joining))

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
