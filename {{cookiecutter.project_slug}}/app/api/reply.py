"""An answer as a whole: what is left of a response where nothing is streamed."""

from dataclasses import dataclass

from starlette.types import Send

JSON = b"application/json"


@dataclass(slots=True)
class Reply:
    status: int
    media_type: bytes
    content: bytes
    more_lines: bytes = b""
    """Of the header: beside those of every answer, as they go over the wire. Names are in lower
    case."""

    def header_lines(self, request_id: str) -> bytes:
        """As they go over the wire, each with its end of line."""
        return b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b" % (
            self.media_type,
            len(self.content),
            request_id.encode(),
            self.more_lines,
        )

    async def send(self, send: Send) -> None:
        """Send it by ASGI."""
        headers = [
            (b"content-type", self.media_type),
            (b"content-length", str(len(self.content)).encode()),
            *(tuple(line.split(b": ", 1)) for line in self.more_lines.splitlines()),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.content})
