"""One run for all who ask the same: for a thousand callers of a process, and across processes."""

import asyncio
import gc
import json
import resource
import signal
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from app.breaker import State
from app.cache import ResponseCache, Stores, Times
from app.errors import NotReady, PredictionFailed
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics, StoreMetrics
from app.redis_store import RedisStore
from tests.service.caching import Answer, Features, Model, ask, ys
from tests.service.redis_server import RedisServer, StartRedis
from tests.service.server import FAKES, WAIT_S, Service, Start, publish
from tests.service.test_batches import sample
from tests.service.test_redis import until


class Process:
    """What one of several processes has: a cache, a client of Redis, and a model."""

    def __init__(self, url: str, lock_s: float) -> None:
        self.model = Model()
        self.redis = RedisStore(url, 0.5, StoreMetrics())
        self.cache = ResponseCache(
            ["model", "1"],
            (Features, Answer),
            Stores(MemoryStore(1_000_000), self.redis),
            Times(60, lock_s),
            CacheMetrics("tested", "1"),
        )

    def ask(self, *xs: float, **terms: Any) -> Any:
        return ask(self.cache, self.model, *xs, **terms)

    async def until_asked(self, *runs: list[float]) -> None:
        await until(lambda: self.model.asked == list(runs))


Test = Callable[[Process, Process], Coroutine[Any, Any, None]]


@pytest.fixture
def server(start_redis: StartRedis) -> RedisServer:
    return start_redis()


def run(server: RedisServer, test: Test, lock_s: float = 60) -> None:
    async def of_two() -> None:
        processes = [Process(server.url, lock_s) for _ in range(2)]
        try:
            await asyncio.wait_for(test(*processes), WAIT_S)
        finally:
            for process in processes:
                await process.redis.close()

    asyncio.run(of_two())


def is_locked(server: RedisServer) -> bool:
    names: Any = server.client.keys("*:lock")
    return bool(names)


def has_asked_more(model: Model, times: int) -> bool:
    return len(model.asked) > times


class TestLocks:
    def test_of_two_processes_one_runs_the_model(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            others = [two.ask(1) for _ in range(5)]
            assert is_locked(server)
            one.model.say()
            answers = await asyncio.gather(first, *others)
            assert [ys(answer) for answer in answers] == [[2]] * 6
            assert two.model.asked == []
            await until(lambda: not is_locked(server))

        run(server, test)

    def test_of_many_rows_those_that_nobody_runs(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1, 2)
            await one.until_asked([1, 2])
            second = two.ask(2, 3)
            await two.until_asked([3])
            two.model.say()
            one.model.say()
            assert ys(await first) == [2, 4]
            assert ys(await second) == [4, 6]
            assert two.model.asked == [[3]]

        run(server, test)

    def test_when_the_first_leaves_another_runs_it(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            second = two.ask(1)
            first.cancel()
            await two.until_asked([1])
            assert one.model.tickets[0].outlet.done()
            two.model.say()
            assert ys(await second) == [2]

        run(server, test)

    def test_when_its_process_dies_the_lock_does(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            await one.redis.close()
            second = two.ask(1)
            await two.until_asked([1])
            two.model.say()
            assert ys(await second) == [2]
            first.cancel()

        run(server, test, lock_s=0.2)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_without_redis_each_runs_its_own(self, server: RedisServer, number: int) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            second = two.ask(1)
            server.signal(number)
            await two.until_asked([1])
            one.model.say()
            two.model.say()
            assert ys(await first) == ys(await second) == [2]

        run(server, test)

    def test_nobody_waits_for_others_for_more_than_half_of_its_time(
        self, server: RedisServer
    ) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            second = two.ask(1, deadline=monotonic() + 0.2)
            await two.until_asked([1])
            two.model.say()
            assert ys(await second) == [2]
            one.model.say()
            assert ys(await first) == [2]

        run(server, test)

    def test_many_at_once_are_one_exchange(self, server: RedisServer) -> None:
        async def test(one: Process, _: Process) -> None:
            requests = [one.ask(x) for x in range(100)]
            await until(lambda: len(one.model.asked) == 100)
            names: Any = server.client.keys("*:lock")
            assert len(names) == 100
            assert one.redis._writing.state is State.CLOSED
            for number in range(100):
                one.model.say(number)
            await asyncio.gather(*requests)
            await until(lambda: not is_locked(server))

        run(server, test)

    def test_who_leaves_while_it_asks_for_a_lock_leaves_none(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            for turns in range(8):
                first = one.ask(1)
                for _ in range(turns):
                    await asyncio.sleep(0)
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            await until(lambda: not one.redis._locks._asking and not one.redis._writer)
            second = two.ask(1)
            await until(lambda: two.model.asked)
            two.model.say()
            assert ys(await second) == [2]

        run(server, test)

    def test_a_process_that_ends_takes_its_locks_with_it(self, server: RedisServer) -> None:
        async def test(one: Process, _: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            one.model.tickets[0].outlet.set_exception(NotReady("The service is stopping."))
            with pytest.raises(NotReady):
                await first
            await one.redis.close()
            assert not is_locked(server)

        run(server, test)

    def test_an_answer_of_others_is_not_kept_anew(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            early = two.ask(1)
            await two.until_asked([1])
            two.model.say()
            await early
            # Of two rows one is known, the other takes its time.
            many = one.ask(1, 2)
            await one.until_asked([2])
            fresh = one.ask(1, refresh=True)
            await one.until_asked([2], [1])
            one.model.say(1, Answer(y=777))
            await fresh
            one.model.say(0)
            await many
            assert ys(await one.ask(1)) == [777]

        run(server, test)

    def test_an_older_run_does_not_override_a_refresh(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            older = one.ask(1)
            await one.until_asked([1])
            fresh = one.ask(1, refresh=True)
            await one.until_asked([1], [1])
            one.model.say(1, Answer(y=777))
            assert ys(await fresh) == [777]
            one.model.say(0)
            assert ys(await older) == [2]
            assert ys(await one.ask(1)) == ys(await two.ask(1)) == [777]

        run(server, test)

    def test_it_leaves_nothing_for_the_garbage_collector(self, server: RedisServer) -> None:
        async def test(one: Process, _: Process) -> None:
            async def fail() -> None:
                for end in ("leaves", "fails"):
                    asked = len(one.model.asked)
                    request = one.ask(1)
                    await until(partial(has_asked_more, one.model, asked))
                    if end == "leaves":
                        request.cancel()
                    else:
                        one.model.tickets[-1].outlet.set_exception(PredictionFailed("broken"))
                    await asyncio.gather(request, return_exceptions=True)
                    await until(lambda: not is_locked(server))
                one.model.tickets.clear()

            await fail()
            gc.collect()
            await fail()
            assert gc.collect() == 0

        run(server, test)

    def test_what_is_refused_leaves_no_lock(self, server: RedisServer) -> None:
        def refuse(*_: object) -> Any:
            raise NotReady("no")

        async def test(one: Process, two: Process) -> None:
            one.model.submit = refuse  # type: ignore[method-assign,assignment]
            with pytest.raises(NotReady):
                await one.ask(1)
            second = two.ask(1)
            await two.until_asked([1])
            two.model.say()
            assert ys(await second) == [2]

        run(server, test)

    def test_who_wants_a_fresh_answer_does_not_wait(self, server: RedisServer) -> None:
        async def test(one: Process, two: Process) -> None:
            first = one.ask(1)
            await one.until_asked([1])
            second = two.ask(1, refresh=True)
            await two.until_asked([1])
            two.model.say(-1, Answer(y=7))
            assert ys(await second) == [7]
            one.model.say()
            assert ys(await first) == [2]

        run(server, test)


@pytest.fixture
def held(tmp_path: Path) -> dict[str, Any]:
    """Settings of a service whose model waits for the test, and is cached."""
    source = (FAKES / "gate.py").read_text()
    (tmp_path / "predictors").mkdir()
    (tmp_path / "predictors/gate.py").write_text(
        source.replace("cache = False", "cache_lock_s = 60\n    runs_inline = False")
    )
    publish(tmp_path / "artifacts", "gate", none=b"")
    return {
        "PREDICTORS_DIR": tmp_path / "predictors",
        "ARTIFACTS_DIR": tmp_path / "artifacts",
        "DEFAULT_MODEL": "gate",
    }


LABELS = {"model": "gate", "version": "1"}


def rows_run(service: Service) -> float:
    return sample(service, "inference_batch_size_sum", **LABELS)


def followers(service: Service) -> float:
    return sample(service, "cache_followers_total", **LABELS)


def test_across_services(start: Start, redis_url: str, held: dict[str, Any], pipe: Path) -> None:
    services = [start(REDIS_URL=redis_url, **held).wait_for("/ready") for _ in range(2)]
    before = sum(map(rows_run, services))
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(service.post_alone, "/v1/predict", {"features": {"pipe": str(pipe)}})
            for service in services * 4
        ]
        # Opens when the model of one of them does.
        with pipe.open("w") as gate:
            for service in services:
                service.wait_until(partial(all_follow, service, 3))
            gate.write("go")
        answers = [future.result(WAIT_S) for future in asked]
    assert {answer.json()["prediction"]["said"] for answer in answers} == {"go"}
    assert sum(map(rows_run, services)) == before + 1


def all_follow(service: Service, number: int) -> bool:
    return followers(service) == number


CALLERS = 1000


@pytest.mark.parametrize("first_leaves", [False, True])
def test_a_thousand_callers_are_one_run(
    start: Start, held: dict[str, Any], pipe: Path, first_leaves: bool
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4 * CALLERS, hard), hard))
    try:
        service = start(**held).wait_for("/ready")
        before = rows_run(service)
        said = asyncio.run(thousand(service, pipe, first_leaves))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(said) == CALLERS - first_leaves
    assert len({json.dumps(prediction) for prediction in said}) == 1
    assert rows_run(service) == before + 1


async def thousand(service: Service, pipe: Path, first_leaves: bool) -> list[Any]:
    """What those get who have not left."""
    body = json.dumps({"features": {"pipe": str(pipe)}})
    request = (
        "POST /v1/predict HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    connections = []
    for _ in range(CALLERS):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request.encode())
        connections.append((reader, writer))
        if len(connections) == 1:
            gate = await asyncio.to_thread(pipe.open, "w")
    await asyncio.to_thread(service.wait_until, partial(all_follow, service, CALLERS - 1))
    if first_leaves:
        _, writer = connections.pop(0)
        writer.close()
        await asyncio.to_thread(service.wait_until, partial(one_has_left, service))
    gate.write("go")
    gate.close()
    answers = [await reader.read() for reader, _ in connections]
    for _, writer in connections:
        writer.close()
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    return [json.loads(answer.partition(b"\r\n\r\n")[2])["prediction"] for answer in answers]


def one_has_left(service: Service) -> bool:
    return sample(service, "inference_requests_total", outcome="cancelled", **LABELS) == 1
