"""Reads the bodies of requests, each by its deadline, and bounds what all of them take."""

import asyncio
from typing import Any

from starlette.types import Receive

from app.deadlines import Deadlines
from app.errors import BodyTimeout, BodyTooLarge
from app.jobs import Job

SMALL_BYTES = 16 * 1024
"""A body of this size takes hardly more than the rows that are read from it, whose number is
bounded. To count it as well would take time."""

Reader = asyncio.Task[Any] | Job
"""Who waits for a body."""


class ClientLeft(Exception):
    """The connection was closed before the answer."""


class Departure:
    """Cancels who answers a request when its client leaves, where no `Exchange` does.

    Args:
        receive: ASGI's, once there is no more of the body.
    """

    def __init__(self, receive: Receive) -> None:
        self.disconnected = False
        self._receive = receive
        self._listening: asyncio.Task[None] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it does, now."""
        return self._listening is not None

    @is_waiting.setter
    def is_waiting(self, is_waiting: bool) -> None:
        if self._listening:
            self._listening.cancel()
            self._listening = None
        answering = asyncio.current_task()
        if is_waiting and answering:
            self._listening = asyncio.create_task(self._listen(answering))

    async def _listen(self, answering: asyncio.Task[Any]) -> None:
        # A server that says something else has nothing to say.
        if (await self._receive())["type"] == "http.disconnect":
            self.disconnected = True
            answering.cancel()


class NoRoom(Exception):
    """Too many bytes of other requests are held."""


class Bodies:
    """Of all requests of this process.

    Args:
        max_bytes: of one body.
        max_bytes_held: of all that are read, or wait for their answers.
    """

    def __init__(self, max_bytes: int, max_bytes_held: int) -> None:
        self.max_bytes = max_bytes
        self.bytes_held = 0
        self._max_bytes_held = max_bytes_held
        self._reading: Deadlines[Reader] = Deadlines(self._stop_reading)
        self._late: set[Reader] = set()

    def hold(self, number: int) -> None:
        """Count so many bytes, until they are released.

        Raises:
            NoRoom: with them there would be too many.
        """
        if self.bytes_held + number > self._max_bytes_held:
            raise NoRoom
        self.bytes_held += number

    def release(self, number: int) -> None:
        self.bytes_held -= number

    async def read(
        self, receive: Receive, reader: Reader, declared: bytes, deadline: float
    ) -> bytes:
        """The whole body, which is held if it is not small; nothing is, if this raises.

        Args:
            declared: what the header says of the number of bytes; nothing, if it does not.
            deadline: by `monotonic`.

        Raises:
            BodyTooLarge: it has more bytes than are allowed; at most that many were read.
            BodyTimeout: it was not read by the deadline.
            NoRoom: there is none for it.
            ClientLeft: the client did.
        """
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        pieces: list[bytes] = []
        length = held = 0
        more = True
        self._reading.add(reader, deadline)
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                pieces.append(message.get("body", b""))
                length += len(pieces[-1])
                if length > self.max_bytes:
                    raise self._too_large()
                if length > SMALL_BYTES:
                    self.hold(length - held)
                    held = length
                more = message.get("more_body", False)
        except BaseException as error:
            self.release(held)
            if isinstance(error, asyncio.CancelledError) and reader in self._late:
                self._late.discard(reader)
                raise BodyTimeout("The body did not arrive in time.") from None
            raise
        finally:
            self._reading.discard(reader)
        # Once: to add each to those before it would copy a body of 64 MB for four seconds.
        return b"".join(pieces)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is over {self.max_bytes} bytes.")

    def _stop_reading(self, reader: Reader) -> None:
        self._late.add(reader)
        reader.cancel()
