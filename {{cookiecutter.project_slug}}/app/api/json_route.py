"""A route that goes from bytes to pydantic and back without FastAPI's machinery.

FastAPI documents it like any other. To answer it, FastAPI would parse the body with `json`,
validate Python objects and resolve dependencies, for several times the time, and would accept
what JSON has not: NaN and Infinity.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Annotated, Any

from fastapi import Depends, Header
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.api.problems import problem_response
from app.deadlines import Deadlines
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    FieldError,
    ServiceError,
    UnsupportedMediaType,
    invalid_fields,
    invalid_input,
)
from app.metrics import RouteMetrics
from app.settings import Settings

CLIENT_LEFT = 499
"""nginx's status for a client that left; it is seen in logs and metrics alone."""

TIMEOUT = "X-Request-Timeout-Ms"
DEFAULT_PRIORITY = 3
PRIORITY = re.compile(rb"(?:^|,)\s*u=([0-7])\s*(?:[,;]|$)")
"""The urgency in the header `Priority` of RFC 9218, section 4.1: 0 is the most urgent."""


Headers = Mapping[bytes, bytes]
"""By name in lower case; of a header that is repeated, the last."""

Task = asyncio.Task[Any]


@dataclass(slots=True)
class Call:
    """A request to a JSON endpoint, its body aside."""

    request_id: str
    started: float
    """When its header was there, by `perf_counter`."""

    deadline: float
    """In seconds on the event loop's clock."""

    priority: int


def _documented(
    timeout_ms: Annotated[
        int | None,
        Header(alias=TIMEOUT, ge=1, description="Answer with 504 after so many milliseconds."),
    ] = None,
    priority: Annotated[
        str | None,
        Header(description="Which requests go first where many wait, by RFC 9218: `u=0` to `u=7`."),
    ] = None,
) -> None:
    """The headers that make up a call."""


Endpoint = Callable[[Any, Call], Awaitable[Mapping[str, Any]]]
"""Gets the body, and gives the fields of the answer, which may hold pydantic models."""

CallParameter = Annotated[Call, Depends(_documented)]


class ClientLeft(Exception):
    """The connection was closed before the answer."""


class JsonRoute:
    """Answers one path as ASGI: reads the body into `body_model`, and calls `endpoint`.

    Args:
        admit: called with the headers and the deadline before the body is read; may refuse.
    """

    def __init__(
        self,
        path: str,
        endpoint: Endpoint,
        body_model: type[BaseModel],
        settings: Settings,
        admit: Callable[[Headers, float], None],
    ) -> None:
        self.path = path
        self._endpoint = endpoint
        self._body_model = body_model
        self._timeout_s = settings.request_timeout_s
        self._max_body_bytes = settings.max_body_bytes
        self._admit = admit
        self._metrics = RouteMetrics("POST", path)
        self._reading: Deadlines[Task] = Deadlines(self._stop_reading)
        self._late: set[Task] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        request_id: str = scope["state"]["request_id"]
        status, received, content = 500, b"", b""
        try:
            headers = dict(scope["headers"])
            deadline = monotonic() + self._timeout(headers)
            self._admit(headers, deadline)
            require_json(headers)
            task = asyncio.current_task()
            assert task  # noqa: S101
            received = await self._read(receive, headers, deadline, task)
            call = Call(request_id, started, deadline, _priority(headers))
            content = await self._answer(received, call, scope, task)
            status = 200
            await _send_json(send, status, content)
        except ServiceError as error:
            status = error.status.value
            await problem_response(error, request_id)(scope, receive, send)
        except ClientLeft:
            status = CLIENT_LEFT
            await _send_json(send, status, b"")
        finally:
            self._metrics.ended(status, perf_counter() - started, len(received), len(content))

    def _timeout(self, headers: Headers) -> float:
        given = headers.get(b"x-request-timeout-ms")
        if given is None:
            return self._timeout_s
        if not given.isdigit() or len(given) > 9 or int(given) == 0:
            message = "Input should be a whole number of milliseconds, from 1 to 999999999"
            raise invalid_fields([FieldError(field=TIMEOUT, message=message)])
        return min(int(given) / 1000, self._timeout_s)

    async def _read(self, receive: Receive, headers: Headers, deadline: float, task: Task) -> bytes:
        self._reading.add(task, deadline)
        try:
            return await read_body(receive, headers, self._max_body_bytes)
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            self._late.discard(task)
            task.uncancel()
            raise BodyTimeout("The body did not arrive in time.") from None
        finally:
            self._reading.discard(task)

    def _stop_reading(self, task: Task) -> None:
        self._late.add(task)
        task.cancel()

    async def _answer(self, content: bytes, call: Call, scope: Scope, task: Task) -> bytes:
        """
        Raises:
            ServiceError: the body is invalid, or the endpoint raised it.
            ClientLeft: the client did, and the endpoint was cancelled.
        """
        try:
            body = self._body_model.model_validate_json(content)
        except ValidationError as error:
            raise invalid_input(error) from None
        has_left = False

        def leave() -> None:
            nonlocal has_left
            has_left = True
            task.cancel()

        # app.protocol calls it.
        scope["state"]["on_disconnect"] = leave
        try:
            answer = await self._endpoint(body, call)
        except asyncio.CancelledError:
            if not has_left:
                raise
            task.uncancel()
            raise ClientLeft from None
        return to_json(answer, by_alias=True)


def _priority(headers: Headers) -> int:
    given = headers.get(b"priority")
    # What cannot be read is to be ignored (RFC 9218, section 4).
    found = PRIORITY.search(given) if given else None
    return int(found[1]) if found else DEFAULT_PRIORITY


async def _send_json(send: Send, status: int, content: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def require_json(headers: Headers) -> None:
    """
    Raises:
        UnsupportedMediaType: the body is not declared as plain JSON in UTF-8.
    """
    content_type = headers.get(b"content-type", b"")
    if content_type != b"application/json":
        media_type, *parameters = content_type.decode("latin-1").lower().split(";")
        is_json = media_type.strip() == "application/json" or media_type.strip().endswith("+json")
        charsets = [value.strip() for value in parameters if value.strip().startswith("charset=")]
        is_utf8 = all(value.strip('charset="') in ("utf-8", "utf8") for value in charsets)
        if not is_json or not is_utf8:
            raise UnsupportedMediaType("Send JSON in UTF-8, with Content-Type: application/json.")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


async def read_body(receive: Receive, headers: Headers, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it has more than `limit` bytes; at most that much was read.
        ClientLeft: the client did.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"The body is over {limit} bytes.")
    chunks: list[bytes] = []
    received = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunks.append(message.get("body", b""))
        received += len(chunks[-1])
        if received > limit:
            raise BodyTooLarge(f"The body is over {limit} bytes.")
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
