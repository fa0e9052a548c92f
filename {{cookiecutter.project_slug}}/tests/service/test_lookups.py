"""How often a store that other processes share is asked for what it does not have."""

import asyncio
from collections.abc import Mapping
from typing import Any

from app.cache import EARNED_BY_HIT, ResponseCache, Stores, Times
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics
from app.token_bucket import TokenBucket
from tests.service.test_cache import Answer, Features, Model, ask, cache, run, settle, ys


class TestTokenBucket:
    def test_it_gives_so_much_a_second_and_what_was_saved_up(self) -> None:
        now = 0.0
        bucket = TokenBucket(4, 4, clock=lambda: now)
        assert [bucket.take(1) for _ in range(6)] == [True] * 4 + [False] * 2
        now += 0.5
        assert [bucket.take(1) for _ in range(4)] == [True] * 2 + [False] * 2
        now += 60
        assert [bucket.take(1) for _ in range(6)] == [True] * 4 + [False] * 2

    def test_it_is_filled_up_so_seldom_that_those_who_take_of_it_are_together(self) -> None:
        now = 0.0
        bucket = TokenBucket(16, 16, clock=lambda: now)
        assert bucket.take(16)
        taken = []
        for step in range(1, 5):
            now = step / 16
            taken += [bucket.take(1) for _ in range(3)]
        assert taken == [False, False, False, True, True, False] * 2

    def test_who_takes_too_much_leaves_a_debt(self) -> None:
        now = 0.0
        bucket = TokenBucket(4, 4, clock=lambda: now)
        assert bucket.take(8)
        now += 1
        assert not bucket.take(1)
        now += 0.25
        assert bucket.take(1)

    def test_what_is_given_can_be_taken_but_not_saved_up(self) -> None:
        bucket = TokenBucket(4, 4, clock=lambda: 0.0)
        assert bucket.take(4)
        bucket.give(2)
        assert [bucket.take(1) for _ in range(3)] == [True, True, False]
        bucket.give(100)
        assert [bucket.take(1) for _ in range(5)] == [True] * 4 + [False]


class Store:
    """A shared store that counts the questions."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.asked = 0

    def get(self, name: bytes, _: float) -> asyncio.Future[bytes | None]:
        self.asked += 1
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        answer.set_result(self.values.get(name))
        return answer

    def put(self, values: Mapping[bytes, bytes], _: float) -> None:
        self.values |= values


def sharing(store: Any, lookups: float) -> ResponseCache:
    """A cache that has nothing in memory, and so many lookups in all."""
    metrics = CacheMetrics("sharing", "1")
    cached = cache(stores=Stores(MemoryStore(0), store), metrics=metrics)
    cached._lookups = TokenBucket(0, lookups, clock=lambda: 0.0)
    return cached


def unasked(cached: ResponseCache) -> float:
    return cached.metrics._unasked._value.get()  # type: ignore[no-any-return]


def is_to_lead(cached: ResponseCache, x: float, *, refresh: bool = False) -> bool:
    return cached.key_of_new([Features(x=x)], refresh=refresh) is not None


def test_who_comes_alone_is_looked_up_until_too_much_was_in_vain() -> None:
    async def test() -> None:
        cached = sharing(Store(), 3)
        before = unasked(cached)
        assert [is_to_lead(cached, x) for x in range(5)] == [False] * 3 + [True] * 2
        await settle()
        assert unasked(cached) == before + 2

    run(test)


def test_rows_that_come_together_are_looked_up_until_too_much_was_in_vain() -> None:
    async def test() -> None:
        store, model = Store(), Model()
        cached = sharing(store, 3)
        for rows, asked in (((1, 2), 2), ((3, 4), 4), ((5, 6), 4)):
            answer = ask(cached, model, *map(float, rows))
            await settle()
            model.say()
            assert ys(await answer) == [2 * row for row in rows]
            assert store.asked == asked
        # They are kept for others all the same.
        await settle()
        assert len(store.values) == 6

    run(test)


def test_what_finds_something_pays_for_others() -> None:
    async def test() -> None:
        store, model = Store(), Model()
        filling = ask(sharing(store, 1), model, 1.0)
        await settle()
        model.say()
        await filling
        await settle()
        cached = sharing(store, 2 * EARNED_BY_HIT)
        while not is_to_lead(cached, 2):
            pass
        assert ys(await ask(cached, model, 1.0)) == [2]
        assert [is_to_lead(cached, 2) for _ in range(EARNED_BY_HIT)] == [False] * EARNED_BY_HIT
        assert is_to_lead(cached, 2)

    run(test)


def test_who_refreshes_and_who_shares_runs_is_not_counted() -> None:
    async def test() -> None:
        cached = sharing(Store(), 1)
        assert is_to_lead(cached, 1, refresh=True)
        assert not is_to_lead(cached, 1)
        assert is_to_lead(cached, 1)
        stores, metrics = Stores(MemoryStore(0), Store()), CacheMetrics("sharing", "1")  # type: ignore[arg-type]
        locking = ResponseCache(["1"], (Features, Answer), stores, Times(60, 1), metrics)
        locking._lookups = TokenBucket(0, 1, clock=lambda: 0.0)
        assert not any(is_to_lead(locking, 1) for _ in range(3))

    run(test)
