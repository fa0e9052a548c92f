"""A route that goes from bytes to pydantic and back without FastAPI's machinery.

FastAPI documents it like any other. To answer it, FastAPI would parse the body with `json`,
validate Python objects and resolve dependencies, for several times the time, and would accept
what JSON has not: NaN and Infinity.
"""

import asyncio
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, get_args

from fastapi import Body, Depends, Header
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope

from app import inference
from app.api.bodies import SMALL_BYTES, Bodies, ClientLeft, Departure, NoRoom
from app.api.keys import ApiKeys
from app.errors import (
    BodyTimeout,
    DeadlineExceeded,
    FieldError,
    UnsupportedMediaType,
    invalid_fields,
    invalid_input,
)
from app.inference import Answer, CacheStatus, CacheUse
from app.metrics import RouteMetrics
from app.predictor import BaseFeatures
from app.protocol import Exchange
from app.repository import ServedModel
from app.tickets import Timings

if TYPE_CHECKING:
    from app.tracing import RequestSpan

CLIENT_LEFT = 499
"""nginx's status for a client that left; it is seen in logs and metrics alone."""

TIMEOUT = "X-Request-Timeout-Ms"
DEFAULT_PRIORITY = 3
PRIORITY = re.compile(rb"(?:^|,)\s*u=([0-7])\s*(?=[,;]|$)")
"""The urgency in the header `Priority` of RFC 9218, section 4.1: 0 is the most urgent."""


Headers = Mapping[bytes, bytes]
"""By name in lower case; see `app.protocol.headers_of`."""

Parse = Callable[[bytes], BaseModel]

RAW_MEDIA_TYPE = b"application/octet-stream"
"""Of a body that is the numbers of the only feature; see app.tensor."""

STEERING = frozenset((b"x-request-timeout-ms", b"priority", b"cache-control"))
"""Headers that say how a request is to be treated. Mostly there are none."""

CACHE_LINES: dict[CacheStatus, bytes] = {
    status: b"x-cache: %b\r\n" % status.encode() for status in get_args(CacheStatus)
}


@dataclass(eq=False)
class Call:
    """A request, its body aside, and later what became of it."""

    request_id: str
    started: float
    """When it came, as far as its header, by `monotonic`."""

    headers: Headers
    exchange: Exchange | None = None
    """What app.protocol has to offer, if it is the one that serves."""

    route: "JsonRoute | None" = None
    """What answers it. None: FastAPI does."""

    scope: Scope | None = None
    """ASGI's, if FastAPI answers it."""

    # What is mostly as it is here is an attribute of the class, which takes no time.
    deadline: float = field(default=0, init=False)
    """By `monotonic`. Zero until `JsonRoute.admit` has found nothing against the call."""

    priority: int = field(default=DEFAULT_PRIORITY, init=False)
    use: CacheUse = field(default="normal", init=False)
    body: bytes | None = field(default=None, init=False)
    """If it is JSON and not traced: the cache may go by it."""

    takes_one_row: bool = field(default=False, init=False)

    bytes_held: int = field(default=0, init=False)
    """Of the body, until the call is over."""

    span: "RequestSpan | None" = field(default=None, init=False)
    """If it is traced."""

    parsed: tuple[float, float] | None = field(default=None, init=False)
    """When validation began and ended, by `monotonic`, if it is traced."""

    timings: Timings | None = field(default=None, init=False)
    """How the rows fared that the model was asked for."""

    cache: CacheStatus | None = field(default=None, init=False)
    """What the cache had for it."""

    more_lines: bytes = field(default=b"", init=False)
    """See `Reply`."""

    status: int = field(default=0, init=False)
    """Of the answer, once there is one."""

    seconds: float = field(default=0, init=False)
    """From `started` to the answer."""

    ended: float = field(default=0, init=False)
    """When it was answered, by `monotonic`."""

    @property
    def is_alone(self) -> bool:
        return self.exchange is not None and self.exchange.is_alone


@dataclass(frozen=True)
class Endpoint:
    """How rows are found in the body of a request, and how the answer says what came of them."""

    request_type: type[BaseModel]
    response_type: type[BaseModel]
    rows_of: Callable[[Any], list[BaseFeatures]]
    """Of a body, which is a `request_type`."""

    content_of: Callable[[Answer, Call], bytes]
    """The JSON of the answer, a `response_type`.

    Raises InvalidInput if the model could not score all rows.
    """

    summary: str
    example: dict[str, Any]
    """A body."""

    takes_one_row: bool = False

    def documented(self) -> Callable[..., Any]:
        """What FastAPI can read all of this from; it is never called."""

        async def predict(body: Any, headers: Annotated[None, Depends(_headers)]) -> None:
            raise NotImplementedError

        # The types are the model's own, known only now.
        body_type: Any = self.request_type
        predict.__annotations__["body"] = Annotated[body_type, Body(examples=[self.example])]
        return predict


def _headers(
    timeout_ms: Annotated[
        int | None,
        Header(alias=TIMEOUT, ge=1, description="Answer with 504 after so many milliseconds."),
    ] = None,
    priority: Annotated[
        str | None,
        Header(description="Which requests go first where many wait, by RFC 9218: `u=0` to `u=7`."),
    ] = None,
    cache_control: Annotated[
        str | None,
        Header(description="`no-cache`: ask the model anew; `no-store`: and keep nothing."),
    ] = None,
) -> None:
    """Those of STEERING."""


@dataclass(frozen=True)
class Rules:
    """What holds for all routes."""

    timeout_s: float
    """The longest that a request may take."""

    keys: ApiKeys
    bodies: Bodies


class JsonRoute:
    """Answers one path: reads the body, and asks `model`."""

    def __init__(self, path: str, endpoint: Endpoint, model: ServedModel, rules: Rules) -> None:
        self.path = path
        self.model = model
        self._rows_of, self._content_of = endpoint.rows_of, endpoint.content_of
        self._takes_one_row = endpoint.takes_one_row
        body_model = endpoint.request_type
        # As `model_validate_json`, without its ten options.
        self._parse: Parse = body_model.__pydantic_validator__.validate_json
        self._parse_raw: Parse | None = None
        self.openapi_extra: dict[str, Any] = {}
        """What FastAPI cannot know of the body."""

        # Imported by the predictors that have arrays; the service itself does without NumPy.
        if "app.tensor" in sys.modules:
            self._parse_arrays(body_model)
        self._timeout_s, self._keys, self._bodies = rules.timeout_s, rules.keys, rules.bodies
        self.metrics = RouteMetrics("POST", path)

    def _parse_arrays(self, body_model: type[BaseModel]) -> None:
        from app.tensor import raw_field  # noqa: PLC0415
        from app.tensor_parser import parser_for  # noqa: PLC0415

        self._parse = parser_for(body_model) or self._parse
        features: Any = getattr(body_model.model_fields.get("features"), "annotation", None)
        raw = raw_field(features) if features else None
        if raw:
            self._parse_raw = lambda body: body_model.model_construct(features=raw.read(body))
            schema = {"type": "string", "format": "binary", "description": raw.layout}
            content = {RAW_MEDIA_TYPE.decode(): {"schema": schema}}
            self.openapi_extra = {"requestBody": {"content": content}}

    def admit(self, call: Call) -> None:
        """Set the deadline, if there is nothing to say against `call` before its body is read.

        Raises:
            ServiceError: there is.
        """
        headers, timeout_s = call.headers, self._timeout_s
        self._keys.check(headers)
        if not STEERING.isdisjoint(headers):
            timeout_s = self._timeout(headers)
            call.priority = _priority(headers)
            call.use = _cache_use(headers)
        deadline = call.started + timeout_s
        inference.admit(self.model, deadline, call.priority)
        call.deadline = deadline

    async def answer(self, call: Call, receive: Receive | None) -> bytes:
        """The JSON of the answer; without `receive`, the call has an exchange.

        Raises:
            ServiceError: the request is refused, or the model did not score it.
            ClientLeft: there is nobody to answer any more.
        """
        if not call.deadline:
            self.admit(call)
        parse = self._parser(call.headers)
        exchange = call.exchange
        content = exchange.take_content(self._bodies.max_bytes) if exchange else None
        if content is None or len(content) > SMALL_BYTES:
            content = await self._hold(call, content, receive)
        answer, cache = None, self.model.cache
        if cache and parse is self._parse and not call.span:
            call.body, call.takes_one_row = content, self._takes_one_row
            key = cache.bodies.key_of(content) if self._takes_one_row and cache.bodies else None
            answer = inference.recall(self.model, key, call) if key else None
        if answer is None:
            rows = self._rows(parse, content, call)
            waiting = exchange or Departure(receive)  # type: ignore[arg-type]
            waiting.is_waiting = True
            try:
                answer = await inference.predict(self.model, rows, call)
            except asyncio.CancelledError:
                if not waiting.disconnected:
                    raise
                raise ClientLeft from None
            finally:
                waiting.is_waiting = False
        said = self._content_of(answer, call)
        if answer.cache:
            _tell_of_cache(call, answer.cache, answer.age_s)
        return said

    def release(self, call: Call) -> None:
        """It is over, and what is held of its body goes."""
        self._bodies.release(call.bytes_held)

    async def _hold(self, call: Call, content: bytes | None, receive: Receive | None) -> bytes:
        """The body of `call`, which is read if it is not there; what is large is counted."""
        try:
            if content is None:
                reader = call.exchange.job if call.exchange else asyncio.current_task()
                receive = receive or call.exchange.asgi[1]  # type: ignore[union-attr]
                assert reader  # noqa: S101
                declared = call.headers.get(b"content-length", b"")
                content = await self._bodies.read(receive, reader, declared, call.deadline)
            else:
                self._bodies.hold(len(content))
        except NoRoom:
            raise inference.no_room(self.model) from None
        except BodyTimeout:
            if call.exchange and call.exchange.has_unread:
                # It was there, and there was no time for it.
                raise DeadlineExceeded("The body was not read in time.") from None
            raise
        call.bytes_held = len(content) if len(content) > SMALL_BYTES else 0
        return content

    def _parser(self, headers: Headers) -> Parse:
        """
        Raises:
            UnsupportedMediaType: the body is not declared as something that can be read.
        """
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            raise UnsupportedMediaType("Send the body without Content-Encoding.")
        content_type = headers.get(b"content-type", b"")
        if content_type == RAW_MEDIA_TYPE and self._parse_raw:
            return self._parse_raw
        # Mostly it is written so, and then there is nothing to take apart.
        if content_type != b"application/json" and not is_json(content_type):
            raise UnsupportedMediaType("Send JSON in UTF-8, with Content-Type: application/json.")
        return self._parse

    def _rows(self, parse: Parse, content: bytes, call: Call) -> list[BaseFeatures]:
        """
        Raises:
            InvalidInput: `content` is no such body.
        """
        begun = monotonic() if call.span else 0.0
        try:
            return self._rows_of(parse(content))
        except ValidationError as error:
            raise invalid_input(error) from None
        finally:
            if call.span:
                call.parsed = begun, monotonic()

    def _timeout(self, headers: Headers) -> float:
        given = headers.get(b"x-request-timeout-ms")
        if given is None:
            return self._timeout_s
        # The parser leaves what is behind a value, which is no part of it (RFC 9110, section 5.5).
        given = given.rstrip(b" \t")
        if not given.isdigit() or len(given) > 9 or int(given) == 0:
            message = "Input should be a whole number of milliseconds, from 1 to 999999999"
            raise invalid_fields([FieldError(field=TIMEOUT, message=message)])
        return min(int(given) / 1000, self._timeout_s)


def _tell_of_cache(call: Call, status: CacheStatus, age_s: float | None) -> None:
    call.cache, call.more_lines = status, CACHE_LINES[status]
    if age_s is not None:
        call.more_lines += b"age: %d\r\n" % age_s


def _priority(headers: Headers) -> int:
    given = headers.get(b"priority")
    # What cannot be read is to be ignored (RFC 9218, section 4).
    found = PRIORITY.findall(given) if given else None
    # The last counts (RFC 8941, section 3.2).
    return int(found[-1]) if found else DEFAULT_PRIORITY


def _cache_use(headers: Headers) -> CacheUse:
    """By the request's Cache-Control (RFC 9111, section 5.2.1)."""
    given = headers.get(b"cache-control")
    if given is None:
        return "normal"
    directives = {directive.strip() for directive in given.lower().split(b",")}
    if b"no-store" in directives:
        return "none"
    return "refresh" if b"no-cache" in directives else "normal"


def is_json(content_type: bytes) -> bool:
    """Whether it says plain JSON in UTF-8."""
    media_type, *parameters = content_type.decode("latin-1").lower().split(";")
    charsets = [value.strip() for value in parameters if value.strip().startswith("charset=")]
    is_utf8 = all(value.strip('charset="') in ("utf-8", "utf8") for value in charsets)
    is_plain = media_type.strip() == "application/json" or media_type.strip().endswith("+json")
    return is_plain and is_utf8
