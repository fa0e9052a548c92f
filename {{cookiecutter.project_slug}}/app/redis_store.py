"""Cached answers in Redis, where all replicas find them.

Whatever happens to Redis, no caller sees more of it than a miss: each exchange has a time-out,
breakers leave a Redis that fails alone, and nobody waits for a write. Lookups that come while
another is under way go together, which is also what makes them cheap: a command of its own
for each would take longer than a small model does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from functools import cached_property
from itertools import islice, repeat
from math import inf
from time import monotonic, perf_counter
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

import hiredis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, ResponseError
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

NOT_TO_BE_SET = frozenset(
    ("socket_timeout", "socket_connect_timeout", "max_connections", "decode_responses")
)
"""Options of redis-py, which lets a URL overrule what it is told here."""

TRIAL = b"prediction:trial"
"""What is asked for and written, for a millisecond, to see whether Redis is well again."""

TIMER_S = 0.01
"""By more than this no timer of an event loop is early."""

TOLD = (AuthenticationError, RedisConnectionError, RedisTimeoutError, OSError)
"""Errors whose message is logged. Others repeat the command, with a password perhaps."""

MAX_FAULT_CHARS = 200

WRITING = 3
"""A write may take this many times as long as what somebody waits for."""

CONNECTING = 2
"""And so may what it takes to connect, half of it until there is a connection."""

GATHERING_S = 0.01
"""For so long writes wait for others: the more go together, the less each of them costs."""

LONGEST_CLOSE_S = 2.0
"""A stop takes no longer for what is still to be written, whatever the time-out is."""

SET_PX = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$2\r\nPX\r\n$%d\r\n%b\r\n"
"""The one command of which there are many, as it is sent: an array of five strings, each behind its
length. hiredis takes three times as long to say so, which is more than all else that a write
takes."""

Name = bytes

QuestionT = TypeVar("QuestionT", bound=Hashable)
AnswerT = TypeVar("AnswerT")
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
Write = tuple[bytes, int]
"""A value, and for how many milliseconds to keep it; for none: it is to be deleted."""


class _Questions(Generic[QuestionT, AnswerT]):
    """What many want to know, asked together.

    What comes while an exchange is under way shares the next one. The answer is None if the store
    is left alone or tried, the exchange fails, or takes too long.
    """

    def __init__(
        self,
        exchange: Callable[[Sequence[QuestionT]], Awaitable[Sequence[AnswerT] | None]],
        breaker: Breaker,
        timeout_s: float,
    ) -> None:
        self._exchange = exchange
        self._breaker = breaker
        exchanges = MAX_WANTED // MAX_KEYS + 2
        self._longest_s = 2 * exchanges * (CONNECTING + 1) * timeout_s
        """Twice what may pass until one is answered: behind an exchange that is under way and all
        who may wait, each of which may have to connect."""

        self._wanted: dict[QuestionT, list[asyncio.Future[AnswerT | None]]] = {}
        self._patience: Deadlines[asyncio.Future[AnswerT | None]] = Deadlines(_give_up)
        self._asking: asyncio.Task[None] | None = None
        self._is_closed = False

    def ask(self, question: QuestionT, deadline: float) -> asyncio.Future[AnswerT | None]:
        """A future of the answer. Of the time until `deadline` it takes half at the most."""
        wanted = self._wanted
        future: asyncio.Future[AnswerT | None] = self._loop.create_future()
        # Those who wait have been allowed to, and who goes with them costs nothing more.
        if len(wanted) > MAX_WANTED if wanted else not self._may_begin():
            future.set_result(None)
            return future
        futures = wanted.setdefault(question, [])
        if self._asking is None:
            self._asking = self._loop.create_task(self._ask())
        if self._breaker.state is not State.CLOSED:
            # Whether the store is well again is not found out at anybody's expense.
            future.set_result(None)
            return future
        futures.append(future)
        now = monotonic()
        # Mostly there is more time than it can take.
        if deadline - now < self._longest_s:
            self._patience.add(future, (now + deadline) / 2)
        return future

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        # Once, as in app.metrics.
        return asyncio.get_running_loop()

    def _may_begin(self) -> bool:
        return not self._is_closed and self._breaker.allows()

    async def close(self) -> None:
        self._is_closed = True
        if self._asking:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        # A task that never began has resolved nothing.
        self._let_go(self._wanted)

    async def _ask(self) -> None:
        """Ask about all that is wanted, until nothing is."""
        wanted: dict[QuestionT, list[asyncio.Future[AnswerT | None]]] = {}
        try:
            while self._wanted:
                await self._gather()
                wanted = _first_of(self._wanted)
                answers = await self._exchange(list(wanted))
                if answers is None:
                    # Who has come meanwhile has waited as well, and is not to wait once more.
                    return
                self._resolve(wanted, answers)
        finally:
            self._asking = None
            self._let_go(wanted)
            self._let_go(self._wanted)

    async def _gather(self) -> None:
        """Wait for turns of the event loop until one of them brings nobody else."""
        before = 0
        while before < len(self._wanted) < MAX_KEYS:
            before = len(self._wanted)
            await asyncio.sleep(0)

    def _resolve(
        self,
        wanted: dict[QuestionT, list[asyncio.Future[AnswerT | None]]],
        answers: Sequence[AnswerT | None],
    ) -> None:
        for futures, answer in zip(wanted.values(), answers, strict=True):
            for future in futures:
                self._patience.discard(future)
                if not future.done():
                    future.set_result(answer)
        wanted.clear()

    def _let_go(self, wanted: dict[QuestionT, list[asyncio.Future[AnswerT | None]]]) -> None:
        self._resolve(wanted, [None] * len(wanted))


class RedisStore:
    """A client of one Redis; not to be used before there is an event loop.

    Raises:
        Exception: there is no such option as the URL has, or not with such a value.
    """

    def __init__(self, url: str, timeout_s: float, metrics: StoreMetrics) -> None:
        if wrong := NOT_TO_BE_SET & parse_qs(urlsplit(url).query).keys():
            raise ValueError(f"{min(wrong)} is not to be set; REDIS_TIMEOUT_MS can be")
        self._redis = Redis.from_url(
            url,
            socket_connect_timeout=timeout_s,
            # Those of `_shake_hands` and `_exchange` are for all that is said, and take less time.
            socket_timeout=None,
            redis_connect_func=self._shake_hands,
            # Each server and proxy speaks this one, and needs no question before the first.
            protocol=2,
            driver_info=None,
            # Who waits for an answer does not wait for another try.
            retry=Retry(NoBackoff(), 0),
            max_connections=4,
            # With them it would not notice that a connection has data that nobody asked for.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        pool = self._redis.connection_pool
        # It would fail with each exchange.
        pool.make_connection()  # type: ignore[no-untyped-call]
        self._password = pool.connection_kwargs.get("password", "")
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._reading = Breaker(lambda state: self._note("lookups", state))
        self._writing = Breaker(lambda state: self._note("writes", state))
        self._fault = ""
        self._left_alone: set[str] = set()
        """What it has been told of that it is."""

        self._lookups = _Questions(self._look_up, self._reading, timeout_s)
        self._locks = _Questions(self._set_new, self._writing, timeout_s)
        self._unwritten: dict[Name, Write] = {}
        self._unwritten_bytes = 0
        self._being_written: Mapping[Name, Write] = {}
        self._writer: asyncio.Task[None] | None = None
        self._is_closed = False

    def get(self, name: Name, deadline: float) -> asyncio.Future[bytes | None]:
        """What is there, or soon will be; None is also for what could not be found out.

        Args:
            deadline: by `monotonic`; of the time until then, half at the most is spent here.
        """
        if name not in self._unwritten and name not in self._being_written:
            return self._lookups.ask(name, deadline)
        value, _ = self._unwritten.get(name) or self._being_written[name]
        known: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        known.set_result(value or None)
        return known

    def put(self, values: Mapping[Name, bytes], ttl_s: float) -> None:
        """Have `values` written."""
        ttl_ms = max(1, int(ttl_s * 1000))
        self._write_later(values, ttl_ms)

    def discard(self, name: Name) -> None:
        """Have it deleted."""
        self._write_later({name: b""}, 0)

    async def take(self, names: Sequence[Name], ttl_s: float, deadline: float) -> list[bool]:
        """Set those of `names` that are not there, for `ttl_s` at most.

        Whether each was not there; true is also for what could not be found out. Of the time until
        `deadline` half is spent here at the most.
        """
        if self._writing.state is not State.CLOSED:
            # A lock that nobody waits for could come after it was let go.
            return [True] * len(names)
        ttl_ms = max(1, int(ttl_s * 1000))
        answers = [self._locks.ask((name, ttl_ms), deadline) for name in names]
        return [await answer is not False for answer in answers]

    async def close(self) -> None:
        # What was said last is of use to others, and so is that nobody runs it any more.
        if self._writer:
            patience_s = GATHERING_S + (CONNECTING + WRITING) * self._timeout_s
            patience_s = min(patience_s, LONGEST_CLOSE_S)
            await asyncio.wait([self._writer], timeout=patience_s)
        self._is_closed = True
        if self._writer:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._lookups.close()
        await self._locks.close()
        with suppress(Exception):
            await self._redis.aclose()

    async def _look_up(self, names: Sequence[Name]) -> list[bytes | None] | None:
        started = perf_counter()
        try:
            [found] = await self._exchange([packed(b"MGET", *names)], self._timeout_s)
            # A server that answers this with something else is none.
            if not isinstance(found, list) or len(found) != len(names):
                raise TypeError("MGET gave no list of as many values")
            if not {bytes, type(None)}.issuperset(map(type, found)):
                raise TypeError("MGET gave something else than bytes")
        # Redis-py and uvloop raise more than they document.
        except Exception as error:
            self._failed(self._reading, error)
            return None
        self._reading.worked()
        self._metrics.lookup_seconds.observe(perf_counter() - started)
        known = dict(zip(names, found, strict=True))
        # What has been said since the question is newer.
        for writes in (self._being_written, self._unwritten):
            known |= {name: writes[name][0] or None for name in writes.keys() & known}
        return list(known.values())

    async def _set_new(self, locks: Sequence[tuple[Name, int]]) -> list[bool] | None:
        """Whether each was not there; with the milliseconds that it is to last."""
        try:
            commands = [packed(b"SET", name, b"", b"NX", b"PX", ttl_ms) for name, ttl_ms in locks]
            answers = await self._exchange(commands, self._timeout_s)
        except Exception as error:
            self._failed(self._writing, error)
            return None
        self._writing.worked()
        return [answer is not None for answer in answers]

    def _write_later(self, values: Mapping[Name, bytes], ttl_ms: int) -> None:
        waiting = self._unwritten
        for name in waiting.keys() & values.keys():
            self._unwritten_bytes -= len(waiting.pop(name)[0])
        taken, room = values, MAX_WRITES - len(waiting)
        if len(values) > room:
            taken = dict(islice(values.items(), room))
        size = sum(map(len, taken.values()))
        if self._unwritten_bytes + size > MAX_WRITE_BYTES:
            taken = _first_bytes(taken, MAX_WRITE_BYTES - self._unwritten_bytes)
            size = sum(map(len, taken.values()))
        waiting.update(zip(taken, zip(taken.values(), repeat(ttl_ms)), strict=True))
        self._unwritten_bytes += size
        if len(taken) < len(values):
            self._metrics.dropped.inc(len(values) - len(taken))
        if waiting and not self._writer:
            if self._is_closed or not self._writing.allows():
                self._drop_unwritten()
            else:
                self._writer = asyncio.create_task(self._write())

    def _drop_unwritten(self) -> None:
        self._metrics.dropped.inc(len(self._unwritten))
        self._unwritten.clear()
        self._unwritten_bytes = 0

    async def _write(self) -> None:
        """Write all that is to be written, until nothing is."""
        try:
            while self._unwritten:
                if len(self._unwritten) < MAX_KEYS:
                    await asyncio.sleep(GATHERING_S)
                writes = self._being_written = _first_of(self._unwritten)
                self._unwritten_bytes = sum(len(value) for value, _ in self._unwritten.values())
                if not await self._send(writes):
                    self._metrics.dropped.inc(len(writes))
                self._being_written = {}
                if self._writing.state is not State.CLOSED:
                    return
        finally:
            self._writer = None
            self._being_written = {}
            self._drop_unwritten()

    async def _send(self, writes: Mapping[Name, Write]) -> bool:
        """Whether all were written."""
        try:
            commands = [_write_one(name, *write) for name, write in writes.items()]
            await self._exchange(commands, WRITING * self._timeout_s)
        except Exception as error:
            self._failed(self._writing, error)
            return False
        self._writing.worked()
        return True

    async def _exchange(self, commands: Sequence[bytes], timeout_s: float) -> list[Any]:
        """Send `commands`, which are packed, together; what the server says to each.

        Redis-py's client would take as long again for each exchange, and its packing, which is in
        Python for asynchronous connections, 4 us for a row.
        """
        pool = self._redis.connection_pool
        connection = await self._connected()
        try:
            async with asyncio.timeout(timeout_s):
                await connection.send_packed_command(b"".join(commands))
                answers: list[Any] = []
                while len(answers) < len(commands):
                    answers.append(await connection.read_response())
                    answers += _at_hand(connection, len(commands) - len(answers))
                return answers
        except BaseException:
            # What is left on it must not answer the next question.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    async def _connected(self) -> Any:
        pool = self._redis.connection_pool
        try:
            # At a Unix socket redis-py greets before it calls `_shake_hands`.
            async with asyncio.timeout(CONNECTING * self._timeout_s):
                return await pool.get_connection()  # type: ignore[no-untyped-call]
        except TimeoutError:
            # It has kept what was begun.
            await pool.disconnect(inuse_connections=False)
            raise

    async def _shake_hands(self, connection: Any) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.on_connect()
                await connection.send_packed_command(packed(b"HELLO"))
                with suppress(ResponseError):
                    _check_mode(await connection.read_response())
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    def _failed(self, breaker: Breaker, error: Exception) -> None:
        text = str(error) if isinstance(error, TOLD) else ""
        if self._password:
            text = text.replace(self._password, "***")
        self._fault = f"{type(error).__name__}: {text or 'no more is told'}"[:MAX_FAULT_CHARS]
        self._metrics.failures.inc()
        breaker.failed()

    def _note(self, what: Literal["lookups", "writes"], state: State) -> None:
        self._metrics.breaker(what).set(state.value)
        if state is State.OPEN:
            if what not in self._left_alone:
                self._left_alone.add(what)
                log.warning(
                    "Redis is left alone for a while", extra={"what": what, "why": self._fault}
                )
            self._try_later(what)
        elif state is State.CLOSED:
            self._left_alone.discard(what)
            log.info("Redis is in use again", extra={"what": what})

    def _try_later(self, what: Literal["lookups", "writes"]) -> None:
        """If nobody asks until then, it is to be known all the same whether it is well again."""
        loop, context = asyncio.get_running_loop(), Context()
        if what == "lookups":
            pause_s = self._reading.pause_s + TIMER_S
            loop.call_later(pause_s, self._lookups.ask, TRIAL, inf, context=context)
        else:
            pause_s = self._writing.pause_s + TIMER_S
            loop.call_later(pause_s, self._write_later, {TRIAL: b"1"}, 1, context=context)


def _check_mode(hello: Any) -> None:
    """
    Raises:
        RedisConnectionError: by its answer to HELLO, it does not take commands for all keys.
    """
    # By RESP2 a list, by RESP3 a mapping.
    said = dict(zip(hello[::2], hello[1::2], strict=False)) if isinstance(hello, list) else hello
    mode = said.get(b"mode") if isinstance(said, dict) else None
    if mode in (b"cluster", b"sentinel"):
        raise RedisConnectionError(
            f"this server's mode is {mode.decode()}; REDIS_URL has to be of one that is alone, "
            "or of a primary with replicas"
        )


def _first_of(waiting: dict[KeyT, ValueT]) -> dict[KeyT, ValueT]:
    """As many as one command takes, which no longer wait then."""
    if len(waiting) > MAX_KEYS:
        return {key: waiting.pop(key) for key in list(islice(waiting, MAX_KEYS))}
    first = waiting.copy()
    waiting.clear()
    return first


def _first_bytes(values: Mapping[Name, bytes], most: int) -> dict[Name, bytes]:
    """Those that together have no more than so many."""
    taken = {}
    for name, value in values.items():
        if len(value) <= most:
            taken[name] = value
            most -= len(value)
    return taken


def _at_hand(connection: Any, most: int) -> list[Any]:
    """Answers to SET and DEL that came with one that was read: redis-py takes 3 us for each.

    It has no public way to them; where it keeps them elsewhere, there are none here.

    Raises:
        Exception: an answer is an error, or something else than those give.
    """
    reader = getattr(getattr(connection, "_parser", None), "_reader", None)
    answers: list[Any] = []
    while len(answers) < most and isinstance(reader, hiredis.Reader):
        answer = reader.gets()
        if isinstance(answer, Exception):
            raise answer
        # What says that there is no more is an object and nothing else.
        if type(answer) is object:
            break
        if not isinstance(answer, bytes | int | None):
            raise TypeError(f"Redis said {type(answer).__name__} where nobody asked for that")
        answers.append(answer)
    return answers


def packed(*command: bytes | int) -> bytes:
    """A name and its arguments, as they are sent."""
    # Its stub has a tuple of one.
    sent: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return sent


def _write_one(name: Name, value: bytes, ttl_ms: int) -> bytes:
    if not ttl_ms:
        return packed(b"DEL", name)
    ttl = b"%d" % ttl_ms
    return SET_PX % (len(name), name, len(value), value, len(ttl), ttl)


def _give_up(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(None)
