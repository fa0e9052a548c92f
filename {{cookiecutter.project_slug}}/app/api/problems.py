"""Every error answer as `application/problem+json`."""

import asyncio
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app.api.reply import Reply
from app.errors import (
    PROBLEM_MEDIA_TYPE,
    BodyTooLarge,
    FieldError,
    ServiceError,
    invalid_fields,
    problem,
    problem_of,
)

MEDIA_TYPE = PROBLEM_MEDIA_TYPE.encode()

LINGER_S = 2.0
LINGER_BYTES = 16 * 1024 * 1024


class LingeringResponse(Response):
    """An answer to a body that was not read whole, which reads on for a while before it closes.

    A close with unread bytes resets the connection, and the client would never see the answer
    (RFC 9112, section 9.6). What arrives is dropped: `LINGER_BYTES` of it, for `LINGER_S`.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                await self._discard(receive)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard(self, receive: Receive) -> None:
        discarded = 0
        while discarded < LINGER_BYTES:
            message = await receive()
            discarded += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def problem_reply(error: ServiceError, request_id: str) -> Reply:
    # As a number, as an Enum's hash is Python.
    status = int(error.status)
    if error.errors:
        content = to_json(problem(error, request_id), exclude_none=True)
    else:
        # What is sane as a request id needs no escapes.
        content = b'%b%b"}' % (_up_to_request_id(status, error.detail), request_id.encode())
    return Reply(status, MEDIA_TYPE, content, _lines(tuple(error.headers.items())))


@lru_cache(maxsize=256)
def _up_to_request_id(status: int, detail: str) -> bytes:
    """Of the JSON of a problem without fields, of which most are alike."""
    document = problem_of(HTTPStatus(status), detail, request_id="")
    return to_json(document, exclude_none=True).removesuffix(b'"}')


@lru_cache(maxsize=256)
def _lines(headers: tuple[tuple[str, str], ...]) -> bytes:
    return b"".join(
        [b"%b: %b\r\n" % (name.lower().encode(), value.encode()) for name, value in headers]
    )


def problem_response(error: ServiceError, request_id: str) -> Response:
    response_class = LingeringResponse if isinstance(error, BodyTooLarge) else Response
    return response_class(
        problem(error, request_id).model_dump_json(exclude_none=True),
        status_code=error.status,
        headers=dict(error.headers),
        media_type=PROBLEM_MEDIA_TYPE,
    )


def use_problem_details(app: FastAPI) -> None:
    """Answer every error with problem details, the framework's own among them."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _service_error(request: Request, error: Exception) -> Response:
    return problem_response(cast(ServiceError, error), request.state.request_id)


async def _http_error(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    status = HTTPStatus(error.status_code)
    detail = _DETAILS.get(status, status.description or status.phrase)
    document = problem_of(status, detail, request.state.request_id)
    return Response(
        document.model_dump_json(exclude_none=True),
        status_code=status,
        headers=dict(error.headers or {}),
        media_type=PROBLEM_MEDIA_TYPE,
    )


_DETAILS = {
    HTTPStatus.NOT_FOUND: "Nothing is served at this path; /docs lists what is.",
    HTTPStatus.METHOD_NOT_ALLOWED: "This path does not take this method; see the Allow header.",
}


async def _validation_error(request: Request, error: Exception) -> Response:
    found = cast(RequestValidationError, error).errors()
    fields = [
        FieldError(field=".".join(map(str, fault["loc"])), message=fault["msg"]) for fault in found
    ]
    return problem_response(invalid_fields(fields), request.state.request_id)


def problems(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with these errors."""
    # Not as models: FastAPI would prepare to serialize each of them, 20 ms of a start. Their schema
    # is put in by app.api.openapi.
    content: dict[str, Any] = {PROBLEM_MEDIA_TYPE: {}}
    return {status.value: {"description": status.phrase, "content": content} for status in statuses}
