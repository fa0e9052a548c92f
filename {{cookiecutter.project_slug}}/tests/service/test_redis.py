"""The cache with a real Redis, which is stopped, killed, filled up and lied for."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, NamedTuple, Self

import pytest
import redis
from prometheus_client import REGISTRY

from app.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker, State
from app.cache import HEAD
from app.metrics import StoreMetrics
from app.redis_store import MAX_WRITE_BYTES, MAX_WRITES, RedisStore, _at_hand, _Questions, packed
from tests.service.caching import double, runs
from tests.service.redis_server import RedisServer, StartRedis
from tests.service.server import PROJECT, WAIT_S, Service, Start, make_certificate, publish
from tests.service.test_batches import sample

Fault = Literal["none", "reset", "silence", "garbage", "half", "late"]

LATE_S = 0.2
"""Longer than the service waits."""


class Proxy:
    """Stands between a client and Redis, and does to the answers what it is told."""

    def __init__(self, port: int) -> None:
        self.fault: Fault = "none"
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._server.getsockname()[1]}"
        self._redis_port = port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                redis_side = socket.create_connection(("127.0.0.1", self._redis_port))
                for pair in ((client, redis_side, False), (redis_side, client, True)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(65_536):
                if is_answer and self.fault == "reset":
                    linger = (1).to_bytes(4, "little") + bytes(4)
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return
                if is_answer and self.fault == "silence":
                    continue
                if is_answer and self.fault == "garbage":
                    data = b"?" + os.urandom(len(data))
                if is_answer and self.fault == "late":
                    sleep(LATE_S)
                if is_answer and self.fault == "half":
                    data = data[: len(data) // 2]
                target.sendall(data)

    def close(self) -> None:
        self._server.close()


class Tls(NamedTuple):
    """A Redis that is spoken to by TLS."""

    server: RedisServer
    address: str
    certificate: Path


@pytest.fixture
def tls(start_redis: StartRedis, tmp_path: Path) -> Iterator[Tls]:
    server = start_redis()
    certificate, key = make_certificate(tmp_path)
    proxy = [sys.executable, "-m", "tests.service.tls_proxy", str(server.port)]
    with subprocess.Popen(
        [*proxy, str(certificate), str(key)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout
            yield Tls(server, f"127.0.0.1:{process.stdout.readline().strip()}", certificate)
        finally:
            process.kill()


@pytest.fixture
def proxied(start_redis: StartRedis) -> Iterator[tuple[RedisServer, Proxy]]:
    server = start_redis()
    proxy = Proxy(server.port)
    yield server, proxy
    proxy.close()


def breaker(service: Service, operations: str = "lookups") -> float:
    return sample(service, "cache_redis_breaker_state", operations=operations)


def is_in_use(service: Service) -> bool:
    return breaker(service) == breaker(service, "writes") == State.CLOSED


class Caller:
    """Asks for another row each time, so that each goes to Redis and to the model."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.asked = 0

    def asks(self) -> bool:
        self.asked += 1
        answer = double(self.service, self.asked)
        assert answer.status_code == 200
        assert answer.json()["prediction"] == {"y": 2 * self.asked}
        assert self.service.client.get("/ready").status_code == 200
        return True

    def asks_until(self, condition: Callable[[], object]) -> None:
        self.service.wait_until(lambda: self.asks() and condition())


def is_shared(server: RedisServer) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(server.values)
    return False


def test_one_replica_knows_what_another_said(start: Start, start_redis: StartRedis) -> None:
    server = start_redis()
    one = start(REDIS_URL=server.url).wait_for("/ready")
    other = start(REDIS_URL=server.url).wait_for("/ready")
    assert is_in_use(other)
    before = runs(other)
    assert double(one, 1).headers["x-cache"] == "miss"
    one.wait_until(lambda: server.values)
    answer = double(other, 1)
    assert answer.headers["x-cache"] == "hit"
    assert answer.json()["prediction"] == {"y": 2}
    assert runs(other) == before
    labels = {"model": "double", "version": "1"}
    assert sample(other, "cache_hits_total", tier="redis", **labels) == 1
    # From now on it is in memory, too.
    server.kill()
    assert double(other, 1).headers["x-cache"] == "hit"
    assert sample(other, "cache_hits_total", tier="memory", **labels) == 1


def test_it_speaks_tls(start: Start, tls: Tls) -> None:
    url = f"rediss://{tls.address}?ssl_ca_certs={tls.certificate}"
    service = start(REDIS_URL=url).wait_for("/ready")
    Caller(service).asks_until(lambda: is_shared(tls.server))


def test_a_certificate_that_nobody_vouches_for_is_not_trusted(start: Start, tls: Tls) -> None:
    service = start(REDIS_URL=f"rediss://{tls.address}").wait_for("/ready")
    Caller(service).asks_until(lambda: breaker(service) == State.OPEN)
    [line, *_] = service.log_lines("Redis is left alone for a while")
    assert "CERTIFICATE_VERIFY_FAILED" in line["why"]
    assert not is_shared(tls.server)


def test_entries_expire_and_say_nothing_of_the_input(start: Start, start_redis: StartRedis) -> None:
    server = start_redis()
    service = start(REDIS_URL=server.url, CACHE_TTL_S=100).wait_for("/ready")
    body = {"features": {"x": 1, "note": "swordfish"}}
    service.client.post("/v1/predict", json=body)
    service.wait_until(lambda: server.values)
    [(key, value)] = server.values.items()
    assert key.startswith(b"prediction:double:1:")
    assert b"swordfish" not in key + value
    remaining: Any = server.client.pttl(key)
    assert 90_000 < remaining <= 100_000


def test_a_new_version_and_a_changed_file_see_nothing_of_the_old(
    start: Start, start_redis: StartRedis, tmp_path: Path
) -> None:
    server = start_redis()
    (tmp_path / "predictors").mkdir()
    source = Path(__file__).parent / "predictors/double.py"
    changed = tmp_path / "predictors/double.py"
    shutil.copy(source, changed)
    places = {"PREDICTORS_DIR": changed.parent, "ARTIFACTS_DIR": tmp_path / "artifacts"}

    def answer_of_a_new_service() -> float:
        service = start(REDIS_URL=server.url, **places).wait_for("/ready")
        count = len(server.values)
        answer = double(service, 1)
        assert answer.headers["x-cache"] == "miss"
        service.wait_until(lambda: len(server.values) == count + 1)
        y: float = answer.json()["prediction"]["y"]
        return y

    publish(tmp_path / "artifacts", "double", factor_txt=b"2")
    assert answer_of_a_new_service() == 2
    publish(tmp_path / "artifacts", "double", factor_txt=b"3")
    assert answer_of_a_new_service() == 3
    shutil.rmtree(tmp_path / "artifacts")
    publish(tmp_path / "artifacts", "double", factor_txt=b"5")
    assert answer_of_a_new_service() == 5, "the same version, but other files"
    changed.write_text(changed.read_text().replace("self.factor * row.x", "7 * row.x"))
    assert answer_of_a_new_service() == 7, "the same files, but other code"


def test_it_starts_without_redis_and_uses_it_when_it_comes(start: Start, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    service = start(REDIS_URL=server.url).wait_for("/ready")
    caller = Caller(service)
    caller.asks_until(lambda: breaker(service) == State.OPEN)
    assert double(service, 1).headers["x-cache"] == "hit", "memory goes on"
    server.start()
    try:
        caller.asks_until(lambda: is_in_use(service) and is_shared(server))
    finally:
        server.kill()
    assert service.log_lines("Redis is left alone for a while")
    assert service.log_lines("Redis is in use again")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_when_it_dies_or_hangs_nobody_notices(
    start: Start, start_redis: StartRedis, how: str
) -> None:
    server = start_redis()
    service = start(REDIS_URL=server.url).wait_for("/ready")
    caller = Caller(service)
    caller.asks_until(lambda: is_shared(server))
    if how == "killed":
        server.kill()
    else:
        server.signal(signal.SIGSTOP)
    caller.asks_until(lambda: breaker(service) == State.OPEN)
    if how == "killed":
        server.start()
    else:
        server.signal(signal.SIGCONT)
    caller.asks_until(lambda: is_in_use(service) and is_shared(server))


def test_nor_when_it_hangs_behind_a_unix_socket(
    start: Start, start_redis: StartRedis, tmp_path: Path
) -> None:
    path = tmp_path / "redis.sock"
    server = start_redis(f"--unixsocket {path}")
    service = start(REDIS_URL=f"unix://{path}").wait_for("/ready")
    caller = Caller(service)
    caller.asks_until(lambda: is_shared(server))
    server.signal(signal.SIGSTOP)
    caller.asks_until(lambda: breaker(service) == State.OPEN)
    server.signal(signal.SIGCONT)
    server.client.flushall()
    caller.asks_until(lambda: is_in_use(service) and is_shared(server))


def test_one_that_is_far_away_is_used(start: Start, proxied: tuple[RedisServer, Proxy]) -> None:
    server, proxy = proxied
    proxy.fault = "late"
    # Enough for two round trips, also to begin with.
    service = start(REDIS_URL=proxy.url, REDIS_TIMEOUT_MS=2500 * LATE_S).wait_for("/ready")
    Caller(service).asks_until(lambda: is_shared(server))
    assert is_in_use(service)


@pytest.mark.parametrize("fault", ["reset", "silence", "garbage", "half", "late"])
def test_when_the_network_fails_nobody_notices(
    start: Start, proxied: tuple[RedisServer, Proxy], fault: Fault
) -> None:
    server, proxy = proxied
    service = start(REDIS_URL=proxy.url).wait_for("/ready")
    caller = Caller(service)
    caller.asks_until(lambda: is_shared(server))
    proxy.fault = fault
    caller.asks_until(lambda: breaker(service) == State.OPEN)
    proxy.fault = "none"
    server.client.flushall()
    caller.asks_until(lambda: is_in_use(service) and is_shared(server))


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ("--maxmemory 1 --maxmemory-policy noeviction", "CONFIG SET maxmemory 0"),
        ("--replicaof 127.0.0.1 1", "REPLICAOF NO ONE"),
    ],
    ids=["full", "read-only"],
)
def test_when_it_takes_nothing_it_is_still_read(
    start: Start, start_redis: StartRedis, options: str, cure: str
) -> None:
    server = start_redis(options)
    service = start(REDIS_URL=server.url).wait_for("/ready")
    caller = Caller(service)
    caller.asks_until(lambda: breaker(service, "writes") == State.OPEN)
    dropped = sample(service, "cache_redis_dropped_total")
    caller.asks_until(lambda: sample(service, "cache_redis_dropped_total") > dropped)
    assert breaker(service) == State.CLOSED
    assert sample(service, "cache_redis_lookup_seconds_count") > 0
    server.client.execute_command(*cure.split())  # type: ignore[no-untyped-call]
    # Nobody need ask.
    service.wait_until(lambda: breaker(service, "writes") == State.CLOSED)
    caller.asks_until(lambda: is_shared(server))


def test_evictions_are_misses(start: Start, start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory 2mb --maxmemory-policy allkeys-random")
    service = start(REDIS_URL=server.url, CACHE_MAX_BYTES=0).wait_for("/ready")
    instances = [{"x": x, "note": "x" * 10} for x in range(1000)]
    body: Any = {"instances": instances}
    evicted: Any = 0

    def has_evicted() -> bool:
        nonlocal evicted
        answer = service.client.post("/v1/predict/batch", json=body)
        assert [row["y"] for row in answer.json()["predictions"]] == [2 * x for x in range(1000)]
        for row in instances:
            row["note"] = str(row["note"]) + "x"
        info: Any = server.client.info("stats")
        evicted = info["evicted_keys"]
        return bool(evicted)

    service.wait_until(has_evicted)


class TestPasswords:
    acl = "--user default off --user cache on >swordfish ~prediction:* +mget +set +del +keys +get"

    def test_a_user_with_few_rights_is_enough(self, start: Start, start_redis: StartRedis) -> None:
        server = start_redis(self.acl)
        url = f"redis://cache:swordfish@127.0.0.1:{server.port}/0"
        server.client = redis.Redis.from_url(url)
        service = start(REDIS_URL=url).wait_for("/ready")
        Caller(service).asks_until(lambda: is_shared(server))
        assert "swordfish" not in service.log

    def test_a_wrong_one_is_said_once_and_not_repeated(
        self, start: Start, start_redis: StartRedis
    ) -> None:
        server = start_redis(self.acl)
        url = f"redis://cache:trout@127.0.0.1:{server.port}/0"
        service = start(REDIS_URL=url, LOG_LEVEL="debug").wait_for("/ready")
        Caller(service).asks_until(lambda: breaker(service) == State.OPEN)
        [line, *_] = service.log_lines("Redis is left alone for a while")
        assert "AuthenticationError" in line["why"]
        assert "trout" not in service.log

    def test_it_is_not_in_what_an_old_server_says(
        self, start: Start, start_redis: StartRedis
    ) -> None:
        # Such a server repeats the command that it does not know, and the password is part of it.
        server = start_redis(self.acl + " --rename-command HELLO nohello")
        url = f"redis://cache:swordfish@127.0.0.1:{server.port}/0?protocol=3"
        service = start(REDIS_URL=url).wait_for("/ready")
        Caller(service).asks_until(lambda: breaker(service) == State.OPEN)
        assert "swordfish" not in service.log

    @pytest.mark.parametrize("url", ["redis://:tuna/fish@host", "redis://:tuna#fish@h:1"])
    def test_nor_in_the_refusal_of_a_wrong_url(self, start: Start, url: str) -> None:
        service = start(REDIS_URL=url)
        assert service.exit_code() != 0
        assert len([line for line in service.log.splitlines() if "REDIS_URL" in line]) == 1
        assert "tuna" not in service.log

    def test_nor_in_what_is_told_of_a_failure_if_it_is_an_option(self) -> None:
        async def test() -> None:
            store = RedisStore("unix:///nowhere?password=sword%20fish", WAIT_S, StoreMetrics())
            store._failed(store._reading, redis.ConnectionError("sword fish is wrong"))
            assert store._fault == "ConnectionError: *** is wrong"
            await store.close()

        asyncio.run(test())

    @pytest.mark.parametrize(
        "option",
        [
            "soket_timeout=1",
            "protocol=4",
            "socket_timeout=1",
            "socket_connect_timeout=5",
            "max_connections=1",
            "decode_responses=true",
        ],
    )
    def test_an_option_that_is_none_or_not_to_be_set_is_refused_at_the_start(
        self, start: Start, option: str
    ) -> None:
        service = start(REDIS_URL=f"redis://:swordfish@127.0.0.1:1?{option}")
        assert service.exit_code() != 0
        [line] = [line for line in service.log.splitlines() if "REDIS_URL" in line]
        assert option.partition("=")[0] in line
        assert "swordfish" not in service.log

    @pytest.mark.parametrize("scheme", ["redis+sentinel", "redis+cluster", "http", "host"])
    def test_other_kinds_of_server_are_refused_at_the_start(
        self, start: Start, scheme: str
    ) -> None:
        service = start(REDIS_URL=f"{scheme}://:swordfish@127.0.0.1:1")
        assert service.exit_code() != 0
        assert len([line for line in service.log.splitlines() if "REDIS_URL" in line]) == 1
        assert "swordfish" not in service.log


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_node_of_a_cluster_is_told_from_a_server_that_is_alone(
    start: Start, start_redis: StartRedis, protocol: int
) -> None:
    server = start_redis("--cluster-enabled yes")
    service = start(REDIS_URL=f"{server.url}?protocol={protocol}").wait_for("/ready")
    Caller(service).asks_until(lambda: breaker(service) == State.OPEN)
    line = service.log_lines("Redis is left alone for a while")[0]
    assert "this server's mode is cluster; REDIS_URL has to be" in line["why"]


def test_a_server_that_does_not_say_what_it_is_is_used(
    start: Start, start_redis: StartRedis
) -> None:
    server = start_redis("--rename-command HELLO nohello")
    server.client = redis.Redis(port=server.port, protocol=2)
    service = start(REDIS_URL=server.url).wait_for("/ready")
    Caller(service).asks_until(lambda: is_shared(server))


def test_a_sentinel_is_told_from_a_server(start: Start, start_redis: StartRedis) -> None:
    server = start_redis("--sentinel")
    service = start(REDIS_URL=server.url).wait_for("/ready")
    Caller(service).asks_until(lambda: breaker(service) == State.OPEN)
    line = service.log_lines("Redis is left alone for a while")[0]
    assert "this server's mode is sentinel; REDIS_URL has to be" in line["why"]


class Connection:
    """Says what a test wants, in place of redis-py's; a pool of its own, too."""

    answer: Any = None

    async def get_connection(self) -> Self:
        return self

    async def send_packed_command(self, commands: bytes) -> None:
        """To nobody."""

    async def read_response(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def release(self, connection: Self) -> None:
        """There is only one."""

    async def disconnect(self, **_: bool) -> None:
        """It is of no use to know."""

    aclose = disconnect


def store_with(connection: Connection, timeout_s: float = 0.05) -> RedisStore:
    store = RedisStore("redis://127.0.0.1:1", timeout_s, StoreMetrics())
    pool: Any = connection
    store._redis.connection_pool = pool
    return store


async def looked_up(store: RedisStore, names: list[bytes], deadline: float) -> list[bytes | None]:
    return [await value for value in [store.get(name, deadline) for name in names]]


@pytest.mark.parametrize(
    "answer",
    [b"OK", 1, None, [], [1, 2], [b"a"], {b"a": b"b"}, RuntimeError("closed"), AttributeError("x")],
    ids=str,
)
def test_whatever_the_client_does_a_lookup_is_a_miss_and_it_recovers(answer: Any) -> None:
    async def test() -> None:
        connection = Connection()
        connection.answer = answer
        store = store_with(connection)
        for _ in range(3):
            assert await looked_up(store, [b"a", b"b"], monotonic() + 60) == [None, None]
        assert store._reading.state.name == "OPEN"
        connection.answer = [b"1", None]
        store._reading._open_until = 0  # The pause is over.
        # Who comes then does not wait for what comes of it.
        first, second = (store.get(name, monotonic() + 60) for name in (b"a", b"b"))
        assert first.done()
        assert second.done()
        assert store._reading.state.name == "HALF_OPEN"
        await until(lambda: store._reading.state.name == "CLOSED")
        assert await looked_up(store, [b"a", b"b"], monotonic() + 60) == [b"1", None]
        await store.close()

    asyncio.run(test())


def test_while_redis_is_tried_no_lock_is_set() -> None:
    async def test() -> None:
        store = store_with(Silent(), timeout_s=1000)
        store._writing._become(State.OPEN)  # The pause is over: it may be tried.
        assert await store.take([b"a", b"b"], 1, monotonic() + 60) == [True, True]
        assert not store._locks._wanted
        assert store._writing.state is State.OPEN
        await store.close()

    asyncio.run(test())


class Silent(Connection):
    async def read_response(self) -> Any:
        await asyncio.sleep(1000)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0)


def test_who_is_in_a_hurry_does_without() -> None:
    async def test() -> None:
        store = store_with(Silent(), timeout_s=1000)
        patient = asyncio.create_task(looked_up(store, [b"a"], monotonic() + 1000))
        assert await looked_up(store, [b"a", b"b"], monotonic() + 0.02) == [None, None]
        assert not patient.done()
        await store.close()
        assert await patient == [None]

    asyncio.run(test())


def test_what_is_on_its_way_is_there(start_redis: StartRedis) -> None:
    """Else equal requests would ask the model again, where nothing is kept in memory."""
    server = start_redis()

    async def test() -> None:
        store = RedisStore(server.url, 0.5, StoreMetrics())
        server.client.set("b", "old")
        store.put({b"a": b"1"}, 60)
        store.discard(b"b")
        assert await looked_up(store, [b"a", b"b", b"c"], monotonic() + 60) == [b"1", None, None]
        server.signal(signal.SIGSTOP)
        await until(lambda: not store._unwritten)
        assert await looked_up(store, [b"a", b"b"], monotonic() + 60) == [b"1", None], (
            "being written"
        )
        server.signal(signal.SIGCONT)
        await until(lambda: not store._writer)
        assert await looked_up(store, [b"a", b"b"], monotonic() + 60) == [b"1", None], "written"
        assert server.client.get("a") == b"1"
        await store.close()

    asyncio.run(test())


def test_when_too_much_waits_an_older_value_is_not_written_for_a_newer_one() -> None:
    async def test() -> None:
        store = store_with(Silent())
        store.put({b"a": b"old"}, 60)
        for number in range(MAX_WRITES):
            store.put({b"%d" % number: b""}, 60)
        store.put({b"a": b"new"}, 60)
        assert await looked_up(store, [b"a"], monotonic() + 60) in ([b"new"], [None])
        await store.close()

    asyncio.run(test())


def test_of_too_many_bytes_those_that_fit_are_written() -> None:
    async def test() -> None:
        store = store_with(Silent())
        large = b"x" * (MAX_WRITE_BYTES // 2)
        name = "cache_redis_dropped_total"
        before = REGISTRY.get_sample_value(name) or 0
        store.put({b"a": large, b"b": large + b"x", b"c": b"1"}, 60)
        assert list(store._unwritten) == [b"a", b"c"]
        assert REGISTRY.get_sample_value(name) == before + 1
        assert store._unwritten_bytes == len(large) + 1
        await store.close()

    asyncio.run(test())


def test_a_connection_that_an_exchange_has_failed_on_is_dropped() -> None:
    class Late(Silent):
        dropped = 0

        async def disconnect(self, **_: bool) -> None:
            self.dropped += 1

    async def test() -> None:
        connection = Late()
        store = store_with(connection)
        assert await looked_up(store, [b"a"], monotonic() + 60) == [None]
        assert connection.dropped == 1
        await store.close()

    asyncio.run(test())


def test_answers_that_came_together_are_read_together(start_redis: StartRedis) -> None:
    async def test() -> None:
        store = RedisStore(start_redis().url, WAIT_S, StoreMetrics())
        names = [b"name%d" % number for number in range(100)]
        commands = [packed(b"SET", name, b"value", b"NX") for name in names]
        assert await store._exchange(commands[:50], WAIT_S) == [b"OK"] * 50
        assert await store._exchange(commands, WAIT_S) == [None] * 50 + [b"OK"] * 50
        failing = [*commands, packed(b"INCR", b"name1"), *commands]
        with pytest.raises(redis.ResponseError):
            await store._exchange(failing, WAIT_S)
        # The answers behind that one are not taken for those of the next exchange.
        assert await store._exchange([packed(b"GET", b"name1")], WAIT_S) == [b"value"]
        pool: Any = store._redis.connection_pool
        connection = await pool.get_connection()
        connection._parser._reader.feed(b"+OK\r\n$-1\r\n:1\r\n>1\r\n+told\r\n")
        assert _at_hand(connection, 2) == [b"OK", None]
        with pytest.raises(TypeError):
            _at_hand(connection, 2)
        assert _at_hand(connection, 1) == []
        await store.close()

    asyncio.run(test())


def test_however_many_ask_it_has_few_connections(start_redis: StartRedis) -> None:
    async def test() -> None:
        server = start_redis()
        store = RedisStore(server.url, WAIT_S, StoreMetrics())
        deadline = monotonic() + 4 * WAIT_S
        names = [b"name%d" % number for number in range(1000)]
        for _ in range(5):
            store.put(dict.fromkeys(names, b"value"), 60)
            await asyncio.gather(looked_up(store, names, deadline), store.take(names, 60, deadline))
        others = int(server.client.info("clients")["connected_clients"]) - 1
        assert 1 <= others <= 4
        await store.close()

    asyncio.run(test())


def test_it_is_asked_once_for_what_it_fails_at() -> None:
    commands: list[bytes] = []

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while command := await reader.read(65_536):
            commands.append(command)
            if b"MGET" in command:
                break
            writer.write(b"-ERR unknown command\r\n")
        writer.close()

    async def test() -> None:
        async with await asyncio.start_server(fail, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            store = RedisStore(f"redis://127.0.0.1:{port}", WAIT_S, StoreMetrics())
            for asked in range(1, FAILURES):
                assert await looked_up(store, [b"a"], monotonic() + 4 * WAIT_S) == [None]
                assert sum(b"MGET" in command for command in commands) == asked
            await store.close()

    asyncio.run(test())


def test_closing_lets_nobody_wait() -> None:
    async def test() -> None:
        for turns in range(3):
            store = store_with(Silent())
            waiting = asyncio.create_task(looked_up(store, [b"a"], monotonic() + 60))
            for _ in range(turns):
                await asyncio.sleep(0)
            await store.close()
            assert await waiting == [None]
            assert await looked_up(store, [b"a"], monotonic() + 60) == [None]

    asyncio.run(test())


def test_nor_for_long_for_what_is_still_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.redis_store.LONGEST_CLOSE_S", 0.01)

    async def test() -> None:
        store = store_with(Silent(), timeout_s=1000 * WAIT_S)
        store.put({b"a": b"1"}, 60)
        await asyncio.wait_for(store.close(), WAIT_S)

    asyncio.run(test())


@pytest.mark.parametrize("garbage", [b"garbage", b"\x02" + bytes(24) + b'{"y":9}'])
def test_what_is_none_of_ours_is_a_miss_and_written_anew(
    start: Start, start_redis: StartRedis, garbage: bytes
) -> None:
    server = start_redis()
    service = start(REDIS_URL=server.url, CACHE_MAX_BYTES=0).wait_for("/ready")
    double(service, 1)
    service.wait_until(lambda: server.values)
    [(key, value)] = server.values.items()
    server.client.set(key, garbage)
    answer = double(service, 1)
    assert answer.headers["x-cache"] == "miss"
    assert answer.json()["prediction"] == {"y": 2}
    service.wait_until(lambda: server.values.get(key, b"")[HEAD.size :] == value[HEAD.size :])


class TestBreaker:
    def test_it_opens_tries_one_and_closes(self) -> None:
        now = 0.0
        states: list[State] = []
        tested = Breaker(states.append, clock=lambda: now)
        for _ in range(2):
            assert tested.allows()
            tested.failed()
        tested.worked()
        for _ in range(3):
            assert tested.allows()
            tested.failed()
        assert not tested.allows()
        now += LONGEST_PAUSE_S
        assert [tested.allows() for _ in range(3)] == [True, False, False]
        tested.failed()
        assert not tested.allows()
        now += LONGEST_PAUSE_S
        assert tested.allows()
        tested.worked()
        assert [tested.allows() for _ in range(3)] == [True, True, True]
        assert states == [*(State.OPEN, State.HALF_OPEN, State.OPEN, State.HALF_OPEN, State.CLOSED)]

    def test_those_who_saw_it_fail_together_do_not_try_it_together(self) -> None:
        several = [Breaker(lambda _: None, clock=lambda: 0.0) for _ in range(20)]
        for tested in several * FAILURES:
            tested.failed()
        pauses = sorted(tested.pause_s for tested in several)
        assert FIRST_PAUSE_S / 2 <= pauses[0] < pauses[-1] <= FIRST_PAUSE_S

    def test_however_often_it_failed_it_tries_again_soon(self) -> None:
        now = 0.0
        tested = Breaker(lambda _: None, clock=lambda: now)
        for _ in range(100):
            tested.failed()
            now += LONGEST_PAUSE_S
            assert tested.allows()


def test_who_came_during_an_exchange_that_fails_does_not_wait_for_another() -> None:
    async def test() -> None:
        asked: list[Sequence[str]] = []
        has_begun, may_fail = asyncio.Event(), asyncio.Event()

        async def exchange(questions: Sequence[str]) -> None:
            asked.append(questions)
            has_begun.set()
            await may_fail.wait()

        questions: _Questions[str, str] = _Questions(exchange, Breaker(lambda _: None), 60)
        first = questions.ask("first", inf)
        await has_begun.wait()
        second = questions.ask("second", inf)
        may_fail.set()
        assert (await first, await second) == (None, None)
        assert asked == [["first"]]

    asyncio.run(test())
