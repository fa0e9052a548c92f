"""How often the cache, or a store that it shares, is asked for what it does not have."""

import asyncio
import itertools
import random
from collections.abc import Iterator, Mapping
from math import nan
from pathlib import Path
from time import time
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic import Field

from app import inference
from app.cache import (
    EARNED_BY_HIT,
    PASSED_BY,
    ResponseCache,
    Stores,
    Times,
)
from app.errors import PredictionFailed
from app.flights import Run
from app.known_bodies import MAX_BODY_BYTES
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics
from app.passed_by import (
    ALWAYS_ASKED,
    ROWS_EARNED_BY_HIT,
    VAIN_ROWS,
    VAIN_ROWS_PER_S,
    PassedBy,
)
from app.predictor import ItemError
from app.redis_store import _write_one, packed
from app.repository import TRIVIAL_BELOW_S, ModelRepository
from app.runner import MEMORY_RUNS
from app.settings import Settings
from app.token_bucket import TokenBucket
from tests.service.caching import (
    Answer,
    Features,
    Model,
    ask,
    cache,
    run,
    served,
    settle,
    terms_of,
    ys,
)
from tests.service.server import FAKES, WAIT_S


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

    def discard(self, name: bytes) -> None:
        self.values.pop(name, None)


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


def is_to_lead(cached: ResponseCache, x: float, *, refresh: bool = False) -> bool:
    return cached.key_of_new([Features(x=x)], None, refresh=refresh) is not None


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


@pytest.mark.parametrize(
    ("said", "content", "invalid"),
    [(0.0, b"{", 1), (0.0, b'{"z":2}', 1), (-1e9, b'{"y":2}', 0), (nan, b'{"y":2}', 0)],
    ids=["no JSON", "no Prediction", "old", "of no time"],
)
def test_what_is_of_no_use_is_deleted(said: float, content: bytes, invalid: int) -> None:
    async def test() -> None:
        store, model = Store(), Model()
        cached = sharing(store, 1)
        key, before = cached.key(Features(x=1)), counted(cached, "invalid")
        store.values[cached._name(key)] = cached._value(key, content, time() + said)
        asking = ask(cached, model, 1.0)
        await settle()
        assert not store.values
        model.say()
        assert ys(await asking) == [2]
        assert counted(cached, "invalid") == before + invalid

    run(test)


def test_a_value_that_was_changed_is_a_miss_and_deleted() -> None:
    async def test() -> None:
        store = Store()
        cached = sharing(store, 1000)
        key, another = (cached.key(Features(x=x)) for x in (1, 2))
        name = cached._name(key)
        right = cached._value(key, b'{"y":2.0}', time())
        changed = [
            right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :] for at in range(len(right))
        ]
        changed += [right[:length] for length in range(1, len(right))]
        changed += [right + b" ", b'{"y":2.0}', cached._value(another, b'{"y":2.0}', time())]
        for value in changed:
            store.values[name], before = value, counted(cached, "invalid")
            found = cached._found(cached._shared, key, await store.get(name, 0))  # type: ignore[arg-type]
            assert found is None
            assert not store.values
            assert counted(cached, "invalid") == before + 1
        known = cached._found(cached._shared, key, right)  # type: ignore[arg-type]
        assert known
        assert known.prediction == Answer(y=2)

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


def bounded(rows: int, **changes: Any) -> ResponseCache:
    """A cache that so many rows may come to in vain for ever."""
    cached = cache(metrics=CacheMetrics("bounded", "1"), **changes)
    cached._passed_by._bucket = TokenBucket(0, rows, clock=lambda: 0.0)
    return cached


def bodies(is_always_asked: bool) -> Iterator[bytes]:
    """Those of which all is done always, or the others."""
    every = (b"%d" % number for number in itertools.count())
    return (body for body in every if (hash(body) % ALWAYS_ASKED == 0) is is_always_asked)


async def send(its: Any, x: float, body: bytes | None = None, **changed: Any) -> inference.Answer:
    answer = await inference.predict(its, [Features(x=x)], terms_of(body=body, **changed))
    await settle()
    return answer


def is_kept(cached: ResponseCache, x: float) -> bool:
    return cached._memory.get(cached.key(Features(x=x))) is not None


def silent(model: Model) -> Any:
    """Asks `model`, which answers when the test says so."""

    def submit(rows: Any, _: float, outlet: Any, **__: Any) -> Any:
        ticket: Any = model.submit(rows, outlet)
        ticket.timings = None
        return ticket

    return submit


class TestOfATrivialModel:
    def test_too_many_rows_in_vain_are_as_without_a_cache(self) -> None:
        async def test() -> None:
            model, cached = Model(), bounded(3)
            its = served(cached, model)
            before = [counted(cached, name) for name in ("misses", "passed_by")]
            for x, body in zip(range(5), bodies(is_always_asked=False), strict=False):
                answer = await send(its, x, body)
                assert (answer.cache, *answer.outcomes) == ("miss", Answer(y=2 * x))
            while cached._passed_by._is_due:  # noqa: ASYNC110 - the cache tells nobody
                await asyncio.sleep(0.01)
            cached._passed_by._bucket.give(1)
            await send(its, 5, next(bodies(is_always_asked=False)))
            after = [counted(cached, name) for name in ("misses", "passed_by")]
            assert [a - b for a, b in zip(after, before, strict=True)] == [6, 2]
            assert model.asked == [[x] for x in range(6)]
            kept = [is_kept(cached, x) for x in range(6)]
            assert kept == [True, True, True, False, False, True]

        run(test)

    def test_of_some_bodies_and_of_what_has_none_all_is_done(self) -> None:
        async def test() -> None:
            cached = bounded(0)
            its, one = served(cached, Model()), next(bodies(is_always_asked=False))
            await send(its, 1, next(bodies(is_always_asked=True)))
            await send(its, 2, None)
            await send(its, 3, one, use="refresh")
            await send(its, 4, one)
            assert [is_kept(cached, x) for x in range(1, 5)] == [True, True, True, False]

        run(test)

    @pytest.mark.parametrize("xs", [[1.0], [1.0, 2.0, 1.0]])
    @pytest.mark.parametrize("leaves", [False, True])
    def test_of_many_who_ask_the_same_the_model_is_asked_once(
        self, monkeypatch: pytest.MonkeyPatch, xs: list[float], leaves: bool
    ) -> None:
        # All that comes, comes before it is looked at again.
        monkeypatch.setattr("app.passed_by.REFILL_S", WAIT_S)

        async def test() -> None:
            model, cached = Model(), bounded(0)
            its, one = served(cached, model), next(bodies(is_always_asked=False))
            rows = [Features(x=x) for x in xs]
            asking = [
                asyncio.create_task(inference.predict(its, rows, terms_of(body=one)))
                for _ in range(100)
            ]
            await asyncio.sleep(0)
            if leaves:
                asking.pop(0).cancel()
            for answer in await asyncio.gather(*asking):
                assert answer.outcomes == [Answer(y=2 * x) for x in xs]
            assert model.asked == [xs]
            await settle()
            answer = await inference.predict(its, rows, terms_of(body=one))
            assert (answer.cache, model.asked) == ("hit", [xs])

        run(test)

    def test_also_if_the_run_takes_longer_than_others_are_remembered(self) -> None:
        async def test() -> None:
            model, cached = Model(), bounded(0)
            its = served(cached, model, submit=silent(model))
            one, other = itertools.islice(bodies(is_always_asked=False), 2)
            asking = []
            for _ in range(3):
                asking.append(asyncio.create_task(send(its, 1, one)))
                await asyncio.sleep(0)
                cached._passed_by._renew()
            later = asyncio.create_task(send(its, 2, other))
            await asyncio.sleep(0)
            assert model.asked == [[1], [2]]
            model.say(0)
            model.say(1)
            for answer in await asyncio.gather(*asking):
                assert answer.outcomes == [Answer(y=2)]
            await later
            cached._passed_by._renew()
            assert not cached._passed_by._lately
            assert not cached._flights.under_way

        run(test)

    def test_large_bodies_are_counted_and_not_held(self) -> None:
        async def test() -> None:
            cached = bounded(0)
            its, before = served(cached, Model()), counted(cached, "passed_by")
            large = (b"%*d" % (MAX_BODY_BYTES + 1, number) for number in itertools.count())
            await send(its, 1, next(body for body in large if hash(body) % ALWAYS_ASKED))
            assert not cached._passed_by._lately
            cached._passed_by._renew()
            assert counted(cached, "passed_by") == before + 1

        run(test)

    def test_the_end_of_one_run_is_not_that_of_another(self) -> None:
        async def test() -> None:
            passed_by = PassedBy(follows_from_json=True, count=lambda _: None)
            outlets = [asyncio.get_running_loop().create_future() for _ in range(2)]
            ticket: Any = None
            first, second = (Run((), outlet, 0, ticket, b"1") for outlet in outlets)
            passed_by.add(first, 1)
            passed_by.add(second, 1)
            passed_by.end(first, b"{}")
            assert passed_by.get(b"1") is second
            passed_by.end(second, b"{}")
            assert [passed_by.get(b"1") for _ in range(2)] == [b"{}", None]

        run(test)

    @pytest.mark.parametrize("fate", ["said", "failed", "invalid", "left", "with another"])
    def test_what_was_passed_by_and_has_its_answer_is_known_to_who_sends_the_same(
        self, monkeypatch: pytest.MonkeyPatch, fate: str
    ) -> None:
        monkeypatch.setattr("app.passed_by.REFILL_S", WAIT_S)

        async def test() -> None:
            model, cached = Model(), bounded(0)
            its, terms = served(cached, model), terms_of(body=next(bodies(is_always_asked=False)))
            rows = [Features(x=x) for x in range(1 + (fate == "with another"))]
            asking = asyncio.create_task(inference.predict(its, rows, terms))
            await asyncio.sleep(0)
            if fate == "failed":
                model.tickets[0].outlet.set_exception(PredictionFailed("It broke."))
            elif fate == "invalid":
                model.say(0, ItemError("x", "Too low."))
            elif fate == "left":
                asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            answer = await inference.predict(its, rows, terms)
            assert answer.outcomes == [Answer(y=2 * row.x) for row in rows]
            assert answer.cache == ("hit" if fate == "said" else "miss")
            assert len(model.asked) == (1 if fate == "said" else 2)

        run(test)

    def test_nor_if_it_is_not_known_what_is_equal_to_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.passed_by.REFILL_S", WAIT_S)

        async def test() -> None:
            model, cached = Model(), bounded(0)
            its, one = served(cached, model), next(bodies(is_always_asked=False))
            name: Any = object()
            rows = [Features.model_construct(x=1, name=name)]
            for _ in range(2):
                answer = await inference.predict(its, rows, terms_of(body=one))
                assert (answer.cache, answer.outcomes) == ("miss", [Answer(y=2)])
                await settle()

        run(test)

    @pytest.mark.parametrize("store", [None, "redis"])
    @pytest.mark.parametrize("is_under_way", [False, True])
    def test_unless_it_was_refreshed_meanwhile(
        self, monkeypatch: pytest.MonkeyPatch, store: str | None, is_under_way: bool
    ) -> None:
        monkeypatch.setattr("app.passed_by.REFILL_S", WAIT_S)

        async def test() -> None:
            shared: Any = Store() if store else None
            stores = Stores(MemoryStore(0 if store else 99_999), shared)
            model, cached = Model(), bounded(0, stores=stores)
            its = served(cached, model, submit=silent(model))
            one = next(bodies(is_always_asked=False))
            first = asyncio.create_task(send(its, 1, one))
            await asyncio.sleep(0)
            if not is_under_way:
                model.say(0)
                await first
            refreshed = asyncio.create_task(send(its, 1, one, use="refresh"))
            await asyncio.sleep(0)
            model.say(1, Answer(y=7))
            await refreshed
            answer = await send(its, 1, one)
            if is_under_way:
                model.say(0)
                await first
                answer = await send(its, 1, one)
            assert (answer.cache, answer.outcomes) == ("hit", [Answer(y=7)])
            assert not cached._flights.under_way

        run(test)

    def test_unless_more_than_the_body_tells_what_row_it_holds(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.passed_by.REFILL_S", WAIT_S)
        chance = itertools.count()

        class Varying(Features):
            name: str = Field(default_factory=lambda: f"{next(chance)}")

        async def test() -> None:
            model, cached = Model(), bounded(0, types=(Varying, Answer))
            its, terms = served(cached, model), terms_of(body=next(bodies(is_always_asked=False)))
            for when in ("at once", "later"):
                asking = [inference.predict(its, [Varying(x=1)], terms) for _ in range(2)]
                assert {answer.cache for answer in await asyncio.gather(*asking)} == {"miss"}, when
                await settle()
            assert len(model.asked) == 4

        run(test)

    def test_rows_that_come_together_are_counted_one_by_one(self) -> None:
        async def test() -> None:
            cached = bounded(3)
            its, sent = served(cached, Model()), bodies(is_always_asked=False)
            before = [counted(cached, name) for name in ("misses", "passed_by")]
            for x in (0, 2, 4):
                rows = [Features(x=x), Features(x=x + 1)]
                await inference.predict(its, rows, terms_of(body=next(sent)))
            await settle()
            cached._passed_by._renew()
            after = [counted(cached, name) for name in ("misses", "passed_by")]
            assert [a - b for a, b in zip(after, before, strict=True)] == [6, 2]
            assert [is_kept(cached, x) for x in range(6)] == [True] * 4 + [False] * 2

        run(test)

    @pytest.mark.parametrize("is_known", [True, False])
    def test_one_row_of_many_pays_for_others(self, is_known: bool) -> None:
        async def test() -> None:
            cached = bounded(2 * ROWS_EARNED_BY_HIT)
            its = served(cached, Model())
            first = send(its, 1)
            if is_known:
                await first
            cached._passed_by._bucket.take(2 * ROWS_EARNED_BY_HIT)
            many = inference.predict(its, [Features(x=1), Features(x=2)], terms_of())
            # Otherwise it is followed.
            await (many if is_known else asyncio.gather(first, many))
            assert cached._passed_by._bucket.take(2 * ROWS_EARNED_BY_HIT) == ROWS_EARNED_BY_HIT

        run(test)

    def test_models_that_take_longer_and_those_that_share_runs_have_no_bound(self) -> None:
        async def test() -> None:
            its = served(bounded(0), Model(), is_trivial=False)
            await send(its, 1, next(bodies(is_always_asked=False)))
            assert is_kept(its.cache, 1)
            locked = bounded(0, stores=Stores(MemoryStore(0), Store()), times=Times(60, 1))  # type: ignore[arg-type]
            one = next(bodies(is_always_asked=False))
            assert locked.key_of_new([Features(x=1)], one, refresh=False) is None

        run(test)

    def test_who_keeps_nothing_takes_nothing(self) -> None:
        async def test() -> None:
            its = served(bounded(1), Model())
            await send(its, 1, next(bodies(is_always_asked=False)), use="none")
            assert its.cache._passed_by._bucket.take(1)

        run(test)

    @pytest.mark.parametrize("how", ["again", "by its body", "from another", "followed"])
    def test_who_comes_again_pays_for_others(self, how: str) -> None:
        async def test() -> None:
            store: Any = Store()
            another = bounded(0, stores=Stores(MemoryStore(99_999), store))
            await send(served(another, Model()), 1)
            stores = Stores(MemoryStore(99_999), store if how == "from another" else None)
            cached = bounded(2 * ROWS_EARNED_BY_HIT, stores=stores)
            its = served(cached, Model())
            if how in ("again", "by its body"):
                await send(its, 1)
            cached._passed_by._bucket.take(2 * ROWS_EARNED_BY_HIT)
            if how == "by its body":
                assert cached.recall(cached.key(Features(x=1)))
            elif how == "followed":
                await asyncio.gather(send(its, 1), send(its, 1))
            else:
                assert (await send(its, 1)).cache == "hit"
            assert cached._passed_by._bucket.take(2 * ROWS_EARNED_BY_HIT) == ROWS_EARNED_BY_HIT

        run(test)

    @pytest.mark.parametrize(
        ("again", "asked"),
        [(1 / 16, 1.0), (0.0, 1 / ALWAYS_ASKED + VAIN_ROWS_PER_S / 10_000)],
    )
    def test_after_a_flood_rows_that_come_twice_far_apart_are_found(
        self, again: float, asked: float
    ) -> None:
        now, per_s, apart = 0.0, 10_000, 5_000

        async def test() -> None:
            nonlocal now
            cached = bounded(0)
            cached._passed_by._bucket = TokenBucket(VAIN_ROWS_PER_S, VAIN_ROWS, clock=lambda: now)
            cached._passed_by._bucket.take(VAIN_ROWS)
            chance, kept = random.Random(1), set()
            future: Any = asyncio.get_running_loop().create_future()
            future.set_result([])
            ticket: Any = None
            sent: list[bytes] = []
            late = {"asked": 0, "found": 0}
            for number in range(40 * per_s):
                now += 1 / per_s
                if number % (per_s // 10) == 0:
                    cached._passed_by._renew()
                is_again = number > apart and chance.random() < again
                body = sent[number - apart] if is_again else b"row %d" % number
                sent.append(body)
                if not cached._passed_by.takes(body, 1):
                    is_found = body in kept
                    cached._passed_by._bucket.give(ROWS_EARNED_BY_HIT * is_found)
                    kept.add(body)
                    if number >= 30 * per_s:
                        late["asked"] += 1
                        late["found"] += is_found
                else:
                    cached.lead(PASSED_BY, Run((), future, 0, ticket, body), 1)
            assert late["asked"] == pytest.approx(10 * per_s * asked, rel=0.1)
            assert late["found"] == pytest.approx(10 * per_s * again, rel=0.1)

        run(test)


def test_a_model_is_trivial_once_its_batches_have_shown_it(tmp_path: Path) -> None:
    async def test() -> None:
        settings = Settings(
            predictors_dir=FAKES,
            artifacts_dir=tmp_path,
            default_model="double",
            cache_enabled=False,
        )
        model = ModelRepository(settings).get("double")
        assert not model.is_trivial
        pace = model._runner.pace
        for of_the_bound, is_trivial in ((0.5, True), (2.0, False), (0.4, True)):
            pace.took(16 * of_the_bound * TRIVIAL_BELOW_S, rows=16)
            assert model.is_trivial is is_trivial
        for _ in range(10 * MEMORY_RUNS):
            pace.took(8 * TRIVIAL_BELOW_S, rows=4)
        assert not model.is_trivial

    run(test)


def test_a_value_is_sent_as_hiredis_would_have_it() -> None:
    for value in (b"", b"a", b"%d\r\n$3\r\n" * 100):
        command = packed(b"SET", b"name %b", value, b"PX", 86_400_000)
        assert _write_one(b"name %b", value, 86_400_000) == command
    assert _write_one(b"name", b"", 0) == packed(b"DEL", b"name")
