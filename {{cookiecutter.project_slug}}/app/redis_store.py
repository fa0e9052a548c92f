"""Cached answers in Redis, where all replicas find them.

Whatever happens to Redis, no caller sees more of it than a miss: each exchange has a time-out,
breakers leave a Redis that fails alone, and nobody waits for a write. Lookups that come while
another is under way go together, which is also what makes them cheap: a command of its own
for each would take longer than a small model does.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from app.breaker import Breaker, State
from app.deadlines import Deadlines
from app.metrics import StoreMetrics

log = logging.getLogger(__name__)

MAX_KEYS = 512
"""Keys in one command."""

MAX_WRITES = 2000
MAX_WRITE_BYTES = 16 * 1024 * 1024
"""What may wait to be written; what comes beyond is dropped."""

MAX_WANTED = 4 * MAX_KEYS
"""Keys that may wait to be looked up; who comes beyond does without."""

TOLD = (AuthenticationError, RedisConnectionError, RedisTimeoutError, OSError)
"""Errors whose message is logged. Others repeat the command, with a password perhaps."""

MAX_FAULT_CHARS = 200

GATHERING_S = 0.01
"""For so long writes wait for others: the more go together, the less each of them costs."""

WRITE_ALL = """
for i, name in ipairs(KEYS) do
    local value, ttl = ARGV[2 * i - 1], ARGV[2 * i]
    if ttl == '0' then redis.call('DEL', name) else redis.call('SET', name, value, 'PX', ttl) end
end
"""
"""To redis-py a command for each write is several times as much work."""

Name = bytes
Wanted = dict[Name, list[asyncio.Future[bytes | None]]]
Write = tuple[bytes, int]
"""A value, and for how many milliseconds to keep it; for none: it is to be deleted."""


class RedisStore:
    """A client of one Redis; not to be used before there is an event loop."""

    def __init__(self, url: str, timeout_s: float, metrics: StoreMetrics) -> None:
        self._redis = Redis.from_url(
            url,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            # Who waits for an answer does not wait for another try.
            retry=Retry(NoBackoff(), 0),
            max_connections=4,
            # With them it would not notice that a connection has data that nobody asked for.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        self._password = unquote(urlsplit(url).password or "")
        # For all of an exchange; a new connection is one of three parts.
        self._timeout_s = 3 * timeout_s
        self._metrics = metrics
        self._reading = Breaker(lambda state: self._note("lookups", state))
        self._writing = Breaker(lambda state: self._note("writes", state))
        self._fault = ""
        self._wanted: Wanted = {}
        self._patience: Deadlines[asyncio.Future[bytes | None]] = Deadlines(_give_up)
        self._reader: asyncio.Task[None] | None = None
        self._unwritten: dict[Name, Write] = {}
        self._unwritten_bytes = 0
        self._being_written: Mapping[Name, Write] = {}
        self._may_run_scripts = True
        self._writer: asyncio.Task[None] | None = None
        self._is_closed = False

    async def get(self, names: Sequence[Name], deadline: float) -> list[bytes | None]:
        """What is there, or soon will be; None is also for what could not be found out.

        Args:
            deadline: by `monotonic`; of the time until then, half at the most is spent here.
        """
        found = {name: write[0] or None for name in names if (write := self._write_of(name))}
        unknown = [name for name in names if name not in found]
        is_taken = not self._is_closed and len(self._wanted) <= MAX_WANTED
        if not (unknown and is_taken and self._reading.allows()):
            return [found.get(name) for name in names]
        loop, now = asyncio.get_running_loop(), monotonic()
        futures: dict[Name, asyncio.Future[bytes | None]] = {}
        for name in unknown:
            future = futures[name] = loop.create_future()
            self._wanted.setdefault(name, []).append(future)
            self._patience.add(future, now + (deadline - now) / 2)
        self._reader = self._reader or loop.create_task(self._read())
        return [await futures[name] if name in futures else found[name] for name in names]

    def put(self, name: Name, value: bytes, ttl_s: float) -> None:
        """Have `value` written."""
        self._write_later(name, (value, max(1, int(ttl_s * 1000))))

    def discard(self, name: Name) -> None:
        """Have it deleted."""
        self._write_later(name, (b"", 0))

    async def take(self, names: Sequence[Name], ttl_s: float) -> list[bool]:
        """Set those of `names` that are not there, for `ttl_s` at most.

        Whether each was not there; true is also for what could not be found out.
        """
        if self._is_closed or not self._writing.allows():
            return [True] * len(names)
        try:
            commands = self._redis.pipeline(transaction=False)
            for name in names:
                commands.set(name, b"", nx=True, px=max(1, int(ttl_s * 1000)))
            async with asyncio.timeout(self._timeout_s):
                taken = [answer is not None for answer in await commands.execute()]
        except Exception as error:
            await self._failed(self._writing, error)
            return [True] * len(names)
        self._writing.worked()
        return taken

    async def close(self) -> None:
        self._is_closed = True
        tasks = [task for task in (self._reader, self._writer) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task that never began has resolved nothing.
        self._let_go(self._wanted)
        with suppress(Exception):
            await self._redis.aclose()

    def _write_of(self, name: Name) -> Write | None:
        """What is on its way."""
        return self._unwritten.get(name) or self._being_written.get(name)

    def _resolve(self, wanted: Wanted, values: Sequence[bytes | None]) -> None:
        for futures, value in zip(wanted.values(), values, strict=True):
            for future in futures:
                self._patience.discard(future)
                if not future.done():
                    future.set_result(value)
        wanted.clear()

    def _let_go(self, wanted: Wanted) -> None:
        self._resolve(wanted, [None] * len(wanted))

    async def _read(self) -> None:
        """Look up all that is wanted, until nothing is."""
        wanted: Wanted = {}
        try:
            while self._wanted:
                await self._gather_wanted()
                names = list(self._wanted)[:MAX_KEYS]
                wanted = {name: self._wanted.pop(name) for name in names}
                self._resolve(wanted, await self._look_up(names))
                if self._reading.state is not State.CLOSED:
                    return
        finally:
            self._reader = None
            self._let_go(wanted)
            self._let_go(self._wanted)

    async def _gather_wanted(self) -> None:
        """Wait for turns of the event loop until one of them brings nobody else."""
        before = 0
        while before < len(self._wanted) < MAX_KEYS:
            before = len(self._wanted)
            await asyncio.sleep(0)

    async def _look_up(self, names: Sequence[Name]) -> list[bytes | None]:
        started = perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                values: Any = await self._redis.mget(names)
            # A server that answers this with something else is none.
            found: list[bytes | None] = [_checked(value) for value in values]
            if len(found) != len(names):
                raise TypeError("MGET gave another number of values")
        # Redis-py and uvloop raise more than they document.
        except Exception as error:
            await self._failed(self._reading, error)
            return [None] * len(names)
        self._reading.worked()
        self._metrics.lookup_seconds.observe(perf_counter() - started)
        return found

    def _write_later(self, name: Name, write: Write) -> None:
        size = len(write[0])
        is_full = self._is_closed or len(self._unwritten) >= MAX_WRITES
        is_heavy = self._unwritten_bytes + size > MAX_WRITE_BYTES
        if is_full or is_heavy or (not self._writer and not self._writing.allows()):
            self._metrics.dropped.inc()
            return
        if replaced := self._unwritten.get(name):
            self._unwritten_bytes -= len(replaced[0])
        self._unwritten[name] = write
        self._unwritten_bytes += size
        self._writer = self._writer or asyncio.create_task(self._write())

    async def _write(self) -> None:
        """Write all that is to be written, until nothing is."""
        try:
            while self._unwritten:
                if len(self._unwritten) < MAX_KEYS:
                    await asyncio.sleep(GATHERING_S)
                names = list(self._unwritten)[:MAX_KEYS]
                writes = {name: self._unwritten.pop(name) for name in names}
                self._unwritten_bytes -= sum(len(value) for value, _ in writes.values())
                self._being_written = writes
                if not await self._send(writes):
                    self._metrics.dropped.inc(len(writes))
                self._being_written = {}
                if self._writing.state is not State.CLOSED:
                    return
        finally:
            self._writer = None
            self._being_written = {}
            self._metrics.dropped.inc(len(self._unwritten))
            self._unwritten.clear()
            self._unwritten_bytes = 0

    async def _send(self, writes: Mapping[Name, Write]) -> bool:
        """Whether all were written."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if not (self._may_run_scripts and await self._run_script(writes)):
                    await self._run_commands(writes)
        except Exception as error:
            await self._failed(self._writing, error)
            return False
        self._writing.worked()
        return True

    async def _run_script(self, writes: Mapping[Name, Write]) -> bool:
        """Whether the server takes scripts; not all do, nor from every user."""
        arguments: list[Any] = [part for write in writes.values() for part in write]
        try:
            running: Any = self._redis.eval(WRITE_ALL, len(writes), *writes, *arguments)
            await running
        except ResponseError as error:
            if isinstance(error, NoPermissionError) or "unknown command" in str(error):
                self._may_run_scripts = False
                return False
            raise
        return True

    async def _run_commands(self, writes: Mapping[Name, Write]) -> None:
        commands = self._redis.pipeline(transaction=False)
        for name, (value, ttl_ms) in writes.items():
            if ttl_ms:
                commands.set(name, value, px=ttl_ms)
            else:
                commands.delete(name)
        await commands.execute()

    async def _failed(self, breaker: Breaker, error: Exception) -> None:
        text = str(error) if isinstance(error, TOLD) else ""
        if self._password:
            text = text.replace(self._password, "***")
        self._fault = f"{type(error).__name__}: {text}"[:MAX_FAULT_CHARS]
        self._metrics.failures.inc()
        breaker.failed()
        # What is left on a connection must not answer the next question.
        with suppress(Exception):
            await self._redis.connection_pool.disconnect(inuse_connections=False)

    def _note(self, what: Literal["lookups", "writes"], state: State) -> None:
        self._metrics.breaker(what).set(state.value)
        if state is State.OPEN:
            log.warning("Redis is left alone for a while", extra={"what": what, "why": self._fault})
        elif state is State.CLOSED:
            log.info("Redis is in use again", extra={"what": what})


def _checked(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    raise TypeError("MGET gave something else than bytes")


def _give_up(future: asyncio.Future[bytes | None]) -> None:
    if not future.done():
        future.set_result(None)
