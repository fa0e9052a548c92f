"""Around every request: its id, its log line, the last resort for errors, and API keys."""

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Mapping, Sequence
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem_response
from app.errors import ServiceError, Unauthorized
from app.lifecycle import Lifecycle
from app.logs import AccessLog, current_request_id

log = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""What is taken over from a caller: nothing that could break a header or a log line."""

MAX_LOGGED_PATH_CHARS = 200
QUIET_PATHS = {"/health", "/startup", "/ready", "/metrics"}


class RequestContext:
    """Gives each request an id, logs it, and answers what nothing else caught."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, access_log: AccessLog) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = perf_counter()
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        is_sane = SANE_REQUEST_ID.fullmatch(given)
        request_id = given.decode("ascii") if is_sane else os.urandom(16).hex()
        scope.setdefault("state", {})["request_id"] = request_id
        # Each request is a task, so nothing else sees this.
        current_request_id.set(request_id)
        status = 0

        async def send_with_context(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self.lifecycle.is_ending:
                    headers = [pair for pair in headers if pair[0].lower() != b"connection"]
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, send_with_context)
        except Exception:
            log.exception("unhandled error")
            if not status:
                error = ServiceError("An unexpected error; the log has it by the request id.")
                await problem_response(error, request_id)(scope, receive, send_with_context)
        path = scope["path"]
        self.access_log.write(
            logging.DEBUG if path in QUIET_PATHS else logging.INFO,
            method=scope["method"],
            path=path[:MAX_LOGGED_PATH_CHARS],
            status=int(status),
            duration_ms=round((perf_counter() - started) * 1000, 3),
            request_id=request_id,
        )


class DirectRoutes:
    """Calls `routes` for a POST to one of their paths, past all that FastAPI does for the rest."""

    def __init__(self, app: ASGIApp, routes: Mapping[str, ASGIApp]) -> None:
        self.app = app
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        route = self.routes.get(scope["path"]) if is_post else None
        await (route or self.app)(scope, receive, send)


class ApiKeys:
    """The API keys that are accepted, by their SHA-256 in hex. None: no key is needed."""

    def __init__(self, digests: Sequence[str]) -> None:
        self._digests = digests

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """
        Raises:
            Unauthorized: the caller has no valid key.
        """
        if not self._digests:
            return
        digest = hashlib.sha256(_key(headers)).hexdigest()
        # Compare with all of them, so that the time taken does not tell which one is right.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Unauthorized("Send a valid API key as X-API-Key, or as a bearer token.")


class RequireApiKey:
    """Lets nobody under /v1 without a key. Probes, metrics and docs stay open."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                self.keys.check(dict(scope["headers"]))
            except Unauthorized as error:
                response = problem_response(error, scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
