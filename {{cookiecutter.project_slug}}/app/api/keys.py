"""API keys: who may ask for predictions."""

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.problems import problem_response
from app.errors import Unauthorized


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
    """Lets nobody without a key to the paths of which `needs_key` is true."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, needs_key: Callable[[str], bool]) -> None:
        self.app = app
        self.keys = keys
        self.needs_key = needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.needs_key(scope["path"]):
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
