"""Around every request: its id, its log line, and the last resort for errors."""

import asyncio
import logging
import re
from collections.abc import Coroutine, Mapping
from random import getrandbits
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.bodies import ClientLeft
from app.api.json_route import CLIENT_LEFT, Call, Headers, JsonRoute
from app.api.observers import Observers
from app.api.problems import problem_reply, problem_response
from app.api.reply import JSON, Reply
from app.errors import BodyTooLarge, ServiceError
from app.lifecycle import Lifecycle
from app.logs import current_request_id
from app.protocol import Asgi, Exchange, headers_of

log = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""What is taken over from a caller: nothing that could break a header or a log line."""

CLOSE = (b"connection", b"close")
CLOSE_LINE = b"%b: %b\r\n" % CLOSE
TRACE = b"traceresponse"
"""Trace Context HTTP Response Headers Format, W3C editor's draft."""


def request_id_of(headers: Headers) -> str:
    """The caller's, if it is sane, or a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and SANE_REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    # It names a request and protects nothing.
    return getrandbits(128).to_bytes(16).hex()


def _enter(call: Call) -> None:
    """What is done from now on in this context is done for `call`."""
    # Each request has one of its own, so nothing else sees this.
    current_request_id.set(call.request_id)
    if call.span:
        call.span.enter()


def _asgi(call: Call, asgi: Asgi | None) -> Asgi:
    if asgi is None:
        assert call.exchange  # noqa: S101
        return call.exchange.asgi
    return asgi


def unforeseen() -> ServiceError:
    return ServiceError("An unexpected error; the log has it by the request id.")


class RequestContext:
    """Gives each request an id, tells of it, and answers what nothing else caught.

    A POST to one of `routes` is answered by that; everything else goes to `app`.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[str, JsonRoute],
        lifecycle: Lifecycle,
        observers: Observers,
    ) -> None:
        self.app = app
        self.routes = routes
        self.plain_paths = {path.encode(): path for path in routes}
        """Of `routes`, as they are sent. Read by app.protocol, which has requests to them begun."""

        self.lifecycle = lifecycle
        self.observers = observers

    def begin(self, exchange: Exchange, *, may_refuse: bool) -> Coroutine[Any, Any, None] | None:
        """What is left to do for a request to one of `routes`; None: it was refused.

        app.protocol asks this before it makes a job of the request. While there is too much to
        do, to say so has to cost as little as can be, or nothing else gets done.
        """
        route, headers = self.routes[exchange.path], exchange.headers
        call = Call(request_id_of(headers), exchange.received, headers, exchange, route)
        self.observers.begin(call)
        # A process that ends closes its connections, too.
        if may_refuse and not self.lifecycle.is_ending:
            try:
                route.admit(call)
            except ServiceError as error:
                # None of these closes the connection.
                self._respond(call, problem_reply(error, call.request_id))
                self.observers.end(call, error.status)
                return None
        return self._answer(route, call)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = headers_of(scope["headers"])
        route = self.routes.get(scope["path"]) if scope["method"] == "POST" else None
        call = Call(request_id_of(headers), monotonic(), headers, route=route, scope=scope)
        self.observers.begin(call)
        if route:
            await self._answer(route, call, (scope, receive, send))
            return

        scope.setdefault("state", {})["request_id"] = call.request_id
        # In Starlette's patterns "$" matches before a newline at the end, too.
        scope["path"] = scope["path"].replace("\n", "%0A")
        _enter(call)
        send_in_context = self._in_context(call, send)
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send_in_context(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            log.exception("unhandled error")
            if not status:
                await problem_response(unforeseen(), call.request_id)(scope, receive, send_and_note)
        self.observers.end(call, status)

    def _in_context(self, call: Call, send: Send) -> Send:
        """`send`, with the headers that every answer has."""

        async def send_in_context(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-request-id", call.request_id.encode())]
                if call.span:
                    extra.append((TRACE, call.span.header))
                if self.lifecycle.is_ending:
                    extra.append(CLOSE)
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        return send_in_context

    async def _answer(self, route: JsonRoute, call: Call, asgi: Asgi | None = None) -> None:
        """Have `route` answer; without `asgi`, the call has an exchange."""
        _enter(call)
        try:
            content = await route.answer(call, asgi[1] if asgi else None)
            reply = Reply(200, JSON, content, call.more_lines)
        except ClientLeft:
            self.observers.end(call, CLIENT_LEFT)
            return
        except BodyTooLarge as error:
            scope, receive, send = _asgi(call, asgi)
            response = problem_response(error, call.request_id)
            # It reads on for a while before it closes, by a clock that a task has to have.
            await asyncio.create_task(response(scope, receive, self._in_context(call, send)))
            self.observers.end(call, error.status)
            return
        except ServiceError as error:
            reply = problem_reply(error, call.request_id)
        except Exception:
            log.exception("unhandled error")
            reply = problem_reply(unforeseen(), call.request_id)
        finally:
            if call.bytes_held:
                route.release(call)
        may_stay_open = not self.lifecycle.is_ending and CLOSE_LINE not in reply.more_lines
        if not (may_stay_open and self._respond(call, reply)):
            await reply.send(self._in_context(call, _asgi(call, asgi)[2]))
        self.observers.end(call, reply.status)

    def _respond(self, call: Call, reply: Reply) -> bool:
        """Whether the reply could be sent past ASGI, and was."""
        if call.exchange is None:
            return False
        lines = reply.header_lines(call.request_id)
        if call.span:
            lines += b"%b: %b\r\n" % (TRACE, call.span.header)
        return call.exchange.respond(reply.status, lines, reply.content)
