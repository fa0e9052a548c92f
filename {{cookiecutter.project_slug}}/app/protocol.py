"""uvicorn's HTTP protocol, with problem details for what is not HTTP."""

import re
from http import HTTPStatus
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import PROBLEM_MEDIA_TYPE, Problem

H2C_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class Protocol(HttpToolsProtocol):
    def data_received(self, data: bytes) -> None:
        # Java's HttpClient offers HTTP/2 with every request over plain HTTP. The parser would
        # stop after the header and lose the body (Kludex/uvicorn#2722); the offer may be ignored
        # (RFC 9110, section 7.8).
        begins_request = self.cycle is None or self.cycle.response_complete
        if begins_request and b"h2c" in data:
            head, end, body = data.partition(b"\r\n\r\n")
            data = H2C_OFFER.sub(b"", head + end[:2]) + end[2:] + body
        super().data_received(data)

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
