"""A small HTTP/1.1 client that keeps many connections busy, and what became of each request."""

import asyncio
import gc
import random
import select
import selectors
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter, process_time
from typing import Any, cast

from httptools import HttpParserError, HttpResponseParser

MAX_CONNECTIONS = 256
"""Of an open loop. A request that is due while all of them are busy waits, which counts."""

RETRY_S = 0.01
"""How long a connection that failed is left alone."""

SEED = 1


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    is_tls: bool = False


@dataclass
class Tally:
    """What became of the requests of one step. Times are in seconds."""

    seconds: float
    """For how long requests were sent."""

    due: int = 0
    """Requests that were to be sent."""

    begun: list[float] = field(default_factory=list)
    """Of the requests answered with 200, when each was due, from the begin of the step."""

    latencies: list[float] = field(default_factory=list)
    """Of the same, from when it was due to the end of its answer."""

    refusals: Counter[int] = field(default_factory=Counter)
    """Other answers, by status."""

    broken: int = 0
    """Connections that failed, with a request on them."""

    waited: int = 0
    """Requests that were due while all connections were busy."""

    lasted: float = 0
    """Until the last answer."""

    busy: float = 0
    """The share of this time for which this process had a CPU."""

    @property
    def unanswered(self) -> int:
        """Requests that were given up, or were still waiting for a connection, at the end."""
        return self.due - len(self.latencies) - self.refusals.total() - self.broken


class Connection(asyncio.Protocol):
    """A kept-alive connection, with one request on it at a time. httptools calls `on_...`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None

    async def connect(self) -> None:
        """
        Raises:
            OSError: nobody answers there.
        """
        if self._transport and not self._transport.is_closing():
            return
        loop, target = asyncio.get_running_loop(), self._target
        context = ssl.create_default_context() if target.is_tls else None
        self._parser = HttpResponseParser(self)
        await loop.create_connection(lambda: self, target.host, target.port, ssl=context)

    async def ask(self, request: bytes) -> int:
        """The status of the answer to `request`, all of which has arrived.

        Raises:
            OSError: there was no answer.
        """
        await self.connect()
        assert self._transport  # noqa: S101
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except asyncio.CancelledError:
            # Its answer would be taken for that of the next request.
            self.close()
            raise

    def close(self) -> None:
        if self._transport:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self.close()

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("closed without an answer"))


class Client:
    """Sends `requests`, one after the other and from the first again, and times their answers.

    Args:
        patience_s: for how long, after a step's last request was due, answers are waited for.
    """

    def __init__(self, target: Target, requests: Sequence[bytes], patience_s: float) -> None:
        self._target = target
        self._requests = cycle(requests)
        self._patience_s = patience_s
        self._connections: list[Connection] = []
        self._arrivals = random.Random(SEED)  # noqa: S311 - the same load each time

    async def closed_loop(self, connections: int, seconds: float) -> Tally:
        """Keep so many connections busy: each sends when it has its answer.

        Raises:
            OSError: nobody answers there.
        """
        tally = Tally(seconds)

        async def keep_busy(connection: Connection) -> None:
            while (now := perf_counter()) < started + seconds:
                tally.due += 1
                await self._ask(connection, now, started, tally)

        async with self._step(connections, tally) as (pool, started):
            await self._finish([keep_busy(connection) for connection in pool], seconds)
        return tally

    async def open_loop(self, rate: float, seconds: float) -> Tally:
        """Send `rate` requests a second whether or not earlier ones are answered, as callers who
        know nothing of each other do (Poisson arrivals). A latency begins when the request was
        due, so that a service that stalls is charged for all that it keeps waiting.

        Raises:
            OSError: nobody answers there.
        """
        tally = Tally(seconds)
        waiting: asyncio.Queue[float | None] = asyncio.Queue()
        idle = MAX_CONNECTIONS

        async def arrive() -> None:
            for offset in self._arrive(rate, seconds):
                # Cannot starve the connections: it sleeps when nothing is due.
                if (pause := started + offset - perf_counter()) > 0:
                    await asyncio.sleep(pause)
                tally.due += 1
                tally.waited += waiting.qsize() >= idle
                waiting.put_nowait(started + offset)
            for _ in range(MAX_CONNECTIONS):
                waiting.put_nowait(None)

        async def answer(connection: Connection) -> None:
            nonlocal idle
            while (due := await waiting.get()) is not None:
                idle -= 1
                await self._ask(connection, due, started, tally)
                idle += 1

        async with self._step(MAX_CONNECTIONS, tally) as (pool, started):
            await self._finish([arrive(), *map(answer, pool)], seconds)
        return tally

    def _arrive(self, rate: float, seconds: float) -> Iterator[float]:
        offset = self._arrivals.expovariate(rate)
        while offset < seconds:
            yield offset
            offset += self._arrivals.expovariate(rate)

    async def _ask(self, connection: Connection, due: float, started: float, tally: Tally) -> None:
        try:
            status = await connection.ask(next(self._requests))
        except OSError:
            tally.broken += 1
            await asyncio.sleep(RETRY_S)
            return
        if status == 200:
            tally.begun.append(due - started)
            tally.latencies.append(perf_counter() - due)
        else:
            tally.refusals[status] += 1

    async def _finish(self, work: Sequence[Coroutine[Any, Any, None]], seconds: float) -> None:
        tasks = [asyncio.ensure_future(part) for part in work]
        _, late = await asyncio.wait(tasks, timeout=seconds + self._patience_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def _step(
        self, connections: int, tally: Tally
    ) -> AsyncIterator[tuple[list[Connection], float]]:
        """That many connections, which are open, and the begin of the step."""
        missing = connections - len(self._connections)
        self._connections += [Connection(self._target) for _ in range(missing)]
        pool = self._connections[:connections]
        for connection in pool:
            await connection.connect()
        # A collection would be counted as latency.
        gc.collect()
        gc.disable()
        used, started = process_time(), perf_counter()
        try:
            yield pool, started
        finally:
            tally.lasted = perf_counter() - started
            tally.busy = (process_time() - used) / tally.lasted
            gc.enable()

    async def close(self) -> None:
        for connection in self._connections:
            connection.close()


class _PreciseSelector(selectors.DefaultSelector):
    """Wakes when the next request is due. epoll, and so uvloop, rounds that up to a whole
    millisecond, which is more than many a model takes; select does not, and can wait for epoll."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            select.select([self.fileno()], [], [], timeout)
        return super().select(0)


def new_loop() -> asyncio.AbstractEventLoop:
    """The event loop for a `Client`."""
    return asyncio.SelectorEventLoop(_PreciseSelector())
