"""An answer as a whole: what is left of a response where nothing is streamed."""

from collections.abc import Mapping
from typing import NamedTuple

from starlette.types import Send

JSON = b"application/json"


class Reply(NamedTuple):
    status: int
    media_type: bytes
    content: bytes
    headers: Mapping[str, str] = {}

    @property
    def header_lines(self) -> bytes:
        """As they go over the wire, each with its end of line."""
        usual = b"content-type: %b\r\ncontent-length: %d\r\n" % (
            self.media_type,
            len(self.content),
        )
        if not self.headers:
            return usual
        return usual + b"".join(b"%b: %b\r\n" % pair for pair in self._raw_headers)

    @property
    def _raw_headers(self) -> list[tuple[bytes, bytes]]:
        return [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]

    async def send(self, send: Send) -> None:
        """Send it by ASGI."""
        headers = [
            (b"content-type", self.media_type),
            (b"content-length", str(len(self.content)).encode()),
            *self._raw_headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.content})
