"""Around every request: its id, its log line, the last resort for errors, and API keys."""

import hashlib
import hmac
import logging
import re
from collections.abc import Sequence
from time import perf_counter
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem_response
from app.errors import ServiceError, Unauthorized
from app.lifecycle import Lifecycle, Phase

access_log = logging.getLogger("app.access")
log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-ID"
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What is taken over from a caller: nothing that could break a header or a log line."""

MAX_LOGGED_PATH_CHARS = 200
QUIET_PATHS = {"/health", "/startup", "/ready", "/metrics"}


class RequestContext:
    """Gives each request an id, logs it, and answers what nothing else caught."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if SANE_REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = perf_counter()
        status = 0

        async def send_with_context(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                if self.lifecycle.phase is Phase.DRAINING:
                    headers["Connection"] = "close"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_context)
            except Exception:
                log.exception("unhandled error")
                if not status:
                    error = ServiceError("An unexpected error; the log has it by the request id.")
                    response = problem_response(error, request_id)
                    await response(scope, receive, send_with_context)
            access_log.log(
                logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO,
                "request",
                extra={
                    "method": scope["method"],
                    "path": scope["path"][:MAX_LOGGED_PATH_CHARS],
                    "status": status,
                    "duration_ms": round((perf_counter() - started) * 1000, 3),
                },
            )


class ApiKeys:
    """Lets nobody under /v1 without a key. Probes, metrics and docs stay open."""

    def __init__(self, app: ASGIApp, digests: Sequence[str]) -> None:
        self.app = app
        self.digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or not scope["path"].startswith("/v1/")
        if is_open or self._is_known(_key(Headers(scope=scope))):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("Send a valid API key as X-API-Key, or as a bearer token.")
        response = problem_response(error, scope["state"]["request_id"])
        await response(scope, receive, send)

    def _is_known(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode()).hexdigest()
        # Compare with all of them, so that the time taken does not tell which one is right.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return any(matches)


def _key(headers: Headers) -> str:
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("X-API-Key", "")
