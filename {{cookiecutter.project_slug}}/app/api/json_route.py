"""A FastAPI route that goes from bytes to pydantic and back without FastAPI's machinery.

It keeps the OpenAPI of an ordinary route. FastAPI would parse the body with `json`, validate
Python objects and resolve dependencies, for twice the time, and would accept what JSON has not:
NaN and Infinity.
"""

import asyncio
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any, get_args

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from app.errors import BodyTimeout, BodyTooLarge, UnsupportedMediaType, invalid_input
from app.settings import Settings

CLIENT_LEFT = 499
"""nginx's status for a client that left; it is seen in logs and metrics alone."""


class JsonRoute(APIRoute):
    """For endpoints `async def endpoint(body, request)` whose `body` is annotated as
    `Annotated[<pydantic model>, ...]` and that return a pydantic model.

    The endpoint finds its deadline, in seconds on the event loop's clock, in
    `request.state.deadline`, and when the request began, by `perf_counter`, in
    `request.state.started`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        body_model: type[BaseModel] = get_args(self.endpoint.__annotations__["body"])[0]
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            settings: Settings = request.app.state.settings
            deadline = asyncio.get_running_loop().time() + settings.request_timeout_s
            request.state.started = perf_counter()
            request.state.deadline = deadline
            require_json(request)
            try:
                async with asyncio.timeout_at(deadline):
                    content = await read_body(request, settings.max_body_bytes)
            except TimeoutError:
                raise BodyTimeout("The body did not arrive in time.") from None
            except ClientDisconnect:
                return Response(status_code=CLIENT_LEFT)
            try:
                body = body_model.model_validate_json(content)
            except ValidationError as error:
                raise invalid_input(error) from None
            answer: BaseModel = await endpoint(body=body, request=request)
            return Response(
                answer.__pydantic_serializer__.to_json(answer, by_alias=True),
                media_type="application/json",
            )

        return handle


def require_json(request: Request) -> None:
    """
    Raises:
        UnsupportedMediaType: the body is not declared as plain JSON in UTF-8.
    """
    media_type, *parameters = request.headers.get("Content-Type", "").lower().split(";")
    is_json = media_type.strip() == "application/json" or media_type.strip().endswith("+json")
    charsets = [value.strip() for value in parameters if value.strip().startswith("charset=")]
    if not is_json or any(value.strip('charset="') not in ("utf-8", "utf8") for value in charsets):
        raise UnsupportedMediaType("Send JSON in UTF-8, with Content-Type: application/json.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it has more than `limit` bytes; at most that much was read.
        ClientDisconnect: the client left.
    """
    error = BodyTooLarge(f"The body is over {limit} bytes.")
    declared = request.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise error
    chunks: list[bytes] = []
    received = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        received += len(chunks[-1])
        if received > limit:
            raise error
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
