"""How often the cache, or a store that it shares, is asked for what it does not have."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from app import inference
from app.cache import EARNED_BY_HIT, VAIN_ROWS, ResponseCache, Stores, Times
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics
from app.redis_store import _write_one, packed
from app.repository import ModelRepository
from app.settings import Settings
from app.token_bucket import TokenBucket
from tests.service.server import publish
from tests.service.test_cache import Answer, Features, Model, ask, cache, run, served, settle, ys


class TestTokenBucket:
    def test_it_gives_so_much_a_second_and_what_was_saved_up(self) -> None:
        now = 0.0
        bucket = TokenBucket(4, 8, clock=lambda: now)
        assert [bucket.take(3) for _ in range(4)] == [3, 3, 2, 0]
        now += 0.5
        assert [bucket.take(1) for _ in range(3)] == [1, 1, 0]
        now += 60
        assert [bucket.take(5) for _ in range(3)] == [5, 3, 0]

    def test_it_is_filled_up_so_seldom_that_those_who_take_of_it_are_together(self) -> None:
        now = 0.0
        bucket = TokenBucket(16, 16, clock=lambda: now)
        assert bucket.take(16) == 16
        taken = []
        for step in range(1, 5):
            now = step / 16
            taken += [bucket.take(1) for _ in range(3)]
        assert taken == [0, 0, 0, 1, 1, 0] * 2

    def test_what_is_given_can_be_taken_but_not_saved_up(self) -> None:
        bucket = TokenBucket(0, 4, clock=lambda: 0.0)
        assert bucket.take(4) == 4
        bucket.give(2)
        assert [bucket.take(1) for _ in range(3)] == [1, 1, 0]
        bucket.give(100)
        assert [bucket.take(5) for _ in range(2)] == [4, 0]


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


def sharing(store: Any, lookups: int, **more: Any) -> ResponseCache:
    """A cache that has nothing in memory, and so many lookups in vain for ever."""
    metrics = CacheMetrics("sharing", "1")
    cached = cache(stores=Stores(MemoryStore(0), store), metrics=metrics, **more)
    cached._lookups = TokenBucket(0, lookups, clock=lambda: 0.0)
    return cached


def counted(cached: ResponseCache, name: str) -> float:
    labels = {"model": cached.metrics.model, "version": cached.metrics.version}
    return REGISTRY.get_sample_value(f"cache_{name}_total", labels) or 0


def unasked(cached: ResponseCache) -> float:
    return counted(cached, "redis_unasked")


def terms_of(**changed: Any) -> Any:
    terms = {"timings": None, "deadline": 1e9, "priority": 0, "body": None, "is_alone": False}
    return SimpleNamespace(**({"use": "normal"} | terms | changed))


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


def test_who_is_not_looked_up_is_answered_together_and_kept_for_others() -> None:
    async def test() -> None:
        store, model = Store(), Model()
        cached = sharing(store, 0)
        its = served(cached, model)
        terms = terms_of()
        asking = [inference.predict(its, [Features(x=1)], terms) for _ in range(3)]
        answers = await asyncio.gather(*asking)
        assert [(answer.cache, answer.age_s) for answer in answers] == [("miss", None)] * 3
        assert model.asked == [[1]]
        await settle()
        assert (store.asked, len(store.values)) == (0, 1)
        terms.use = "refresh"
        assert (await inference.predict(its, [Features(x=2)], terms)).cache == "bypass"
        await settle()
        assert (store.asked, len(store.values)) == (0, 2)
        # Another process, which may look things up.
        its, terms.use = served(sharing(store, 1), model), "normal"
        answer = await inference.predict(its, [Features(x=2)], terms)
        assert answer.cache == "hit"
        assert model.asked == [[1], [2]]

    run(test)


def test_of_rows_that_come_together_as_many_are_looked_up_as_may_be() -> None:
    async def test() -> None:
        store, model = Store(), Model()
        cached = sharing(store, 3)
        before = unasked(cached)
        for rows, asked in (((1, 2), 2), ((3, 4), 3), ((5, 6), 3)):
            answer = ask(cached, model, *map(float, rows))
            await settle()
            model.say()
            assert ys(await answer) == [2 * row for row in rows]
            assert store.asked == asked
        await settle()
        assert unasked(cached) == before + 3
        # They are kept for others all the same.
        assert len(store.values) == 6

    run(test)


def test_what_is_found_pays_for_others() -> None:
    async def test() -> None:
        store, model = Store(), Model()
        filling = ask(sharing(store, 1), model, 1.0)
        await settle()
        model.say()
        await filling
        await settle()
        cached = sharing(store, EARNED_BY_HIT)
        for _ in range(2):
            leads = [is_to_lead(cached, 2) for _ in range(EARNED_BY_HIT + 1)]
            assert leads == [False] * EARNED_BY_HIT + [True]
            assert ys(await ask(cached, model, 1.0)) == [2]

    run(test)


def test_who_follows_a_run_and_who_refreshes_asks_nobody_else() -> None:
    async def test() -> None:
        store, model = Store(), Model()
        cached = sharing(store, 10)
        asking = [ask(cached, model, 1.0)]
        await settle()
        asking += [ask(cached, model, 1.0) for _ in range(3)]
        await settle()
        model.say()
        assert [ys(answer) for answer in await asyncio.gather(*asking)] == [[2]] * 4
        assert store.asked == 1
        assert is_to_lead(cached, 2, refresh=True)

    run(test)


def test_where_processes_share_runs_all_is_looked_up() -> None:
    async def test() -> None:
        cached = sharing(Store(), 0, times=Times(60, 1))
        assert not is_to_lead(cached, 1)
        assert cached._lookups_for(5) == 5

    run(test)


def quick(rows: int) -> ResponseCache:
    """The cache of a quick model, which so many rows may come to in vain for ever."""
    cached = cache(metrics=CacheMetrics("quick", "1"))
    cached._rows = TokenBucket(0, rows, clock=lambda: 0.0)
    return cached


class TestOfAQuickModel:
    def test_too_many_rows_in_vain_are_as_without_a_cache(self) -> None:
        async def test() -> None:
            model, cached = Model(), quick(3)
            its, terms = served(cached, model), terms_of()
            before = [counted(cached, name) for name in ("misses", "passed_by")]
            for x in range(5):
                answer = await inference.predict(its, [Features(x=x)], terms)
                [outcome] = answer.outcomes
                assert (answer.cache, outcome) == ("miss", Answer(y=2 * x))
                await settle()
            assert model.asked == [[x] for x in range(5)]
            after = [counted(cached, name) for name in ("misses", "passed_by")]
            assert [a - b for a, b in zip(after, before, strict=True)] == [5, 2]
            # The others have been kept.
            assert [cached.recall(cached.key(Features(x=x))) is None for x in range(5)] == [
                *3 * [False],
                *2 * [True],
            ]

        run(test)

    def test_who_comes_again_pays_for_others(self) -> None:
        async def again(its: Any) -> None:
            assert (await inference.predict(its, [Features(x=0)], terms_of())).cache == "hit"

        async def by_its_body(its: Any) -> None:
            assert its.cache.recall(its.cache.key(Features(x=0)))

        async def followed(its: Any) -> None:
            asking = [inference.predict(its, [Features(x=-1)], terms_of()) for _ in range(2)]
            await asyncio.gather(*asking)

        async def test() -> None:
            for comes_again in (again, by_its_body, followed):
                cached = quick(EARNED_BY_HIT + 2)
                its = served(cached, Model())
                for x in range(EARNED_BY_HIT):
                    await inference.predict(its, [Features(x=x)], terms_of())
                await settle()
                await comes_again(its)
                # It took one, or is asked without, or took two, and has earned sixteen.
                assert [cached.may_be_asked() for _ in range(EARNED_BY_HIT)] == [True] * 16

        run(test)

    def test_one_found_in_redis_does_too(self) -> None:
        async def test() -> None:
            store: Any = Store()
            filling = cache(stores=Stores(MemoryStore(1_000_000), store))
            await inference.predict(served(filling, Model()), [Features(x=0)], terms_of())
            await settle()
            cached = cache(stores=Stores(MemoryStore(1_000_000), store))
            cached._rows = TokenBucket(0, EARNED_BY_HIT, clock=lambda: 0.0)
            assert cached._rows.take(EARNED_BY_HIT - 1)
            answer = await inference.predict(served(cached, Model()), [Features(x=0)], terms_of())
            assert answer.cache == "hit"
            assert cached._rows.take(100) == EARNED_BY_HIT

        run(test)

    def test_refreshed_rows_and_several_at_once_are_not_counted(self) -> None:
        async def test() -> None:
            model, cached = Model(), quick(0)
            its = served(cached, model)
            await inference.predict(its, [Features(x=1)], terms_of(use="refresh"))
            await inference.predict(its, [Features(x=2), Features(x=3)], terms_of())
            await settle()
            assert all(cached.recall(cached.key(Features(x=x))) for x in (1, 2, 3))

        run(test)

    def test_others_and_those_that_share_runs_have_no_bound(self) -> None:
        async def test() -> None:
            assert not quick(0).may_be_asked()
            slow, locked = cache(), sharing(Store(), 0, times=Times(60, 1))
            locked.bound_rows()
            for cached in (slow, locked):
                assert [cached.may_be_asked() for _ in range(VAIN_ROWS + 1)][-1]

        run(test)


OWN = """
from app.predictor import BaseFeatures, BasePrediction, BasePredictor


class Features(BaseFeatures):
    x: float


class Prediction(BasePrediction):
    y: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(x=1)
    runs_inline = {runs_inline}

    def load(self, artifact_dir, device):
        pass

    def predict(self, batch):
        return [Prediction(y=2 * row.x) for row in batch]
"""


@pytest.mark.parametrize("is_quick", [True, False])
def test_a_model_on_the_event_loop_is_quick(tmp_path: Path, is_quick: bool) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("{runs_inline}", str(is_quick)), encoding="utf-8")
    publish(tmp_path / "artifacts", "own", none=b"")

    async def test() -> None:
        settings = Settings(predictors_dir=tmp_path, artifacts_dir=tmp_path / "artifacts")
        repository = ModelRepository(settings.model_copy(update={"default_model": "own"}))
        await repository.load()
        cached = repository.get("own").cache
        assert cached is not None
        assert (cached._rows is not None) is is_quick
        await repository.close()

    run(test)


def test_a_value_is_sent_as_hiredis_would_have_it() -> None:
    for value in (b"", b"a", b"%d\r\n$3\r\n" * 100):
        command = packed(b"SET", b"name %b", value, b"PX", 86_400_000)
        assert _write_one(b"name %b", value, 86_400_000) == command
    assert _write_one(b"name", b"", 0) == packed(b"DEL", b"name")
