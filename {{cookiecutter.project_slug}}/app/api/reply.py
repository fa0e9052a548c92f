"""An answer as a whole: what is left of a response where nothing is streamed."""

from dataclasses import dataclass
from functools import lru_cache

from starlette.types import Send

JSON = b"application/json"

RawHeaders = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class Reply:
    status: int
    media_type: bytes
    content: bytes
    headers: RawHeaders = ()

    def header_lines(self, request_id: str) -> bytes:
        """As they go over the wire, each with its end of line."""
        usual = b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n" % (
            self.media_type,
            len(self.content),
            request_id.encode(),
        )
        return usual + _lines(self.headers) if self.headers else usual

    async def send(self, send: Send) -> None:
        """Send it by ASGI."""
        headers = [
            (b"content-type", self.media_type),
            (b"content-length", str(len(self.content)).encode()),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.content})


@lru_cache(maxsize=256)
def _lines(headers: RawHeaders) -> bytes:
    # Mostly they say how the cache was used, and for how long.
    return b"".join([b"%b: %b\r\n" % header for header in headers])
