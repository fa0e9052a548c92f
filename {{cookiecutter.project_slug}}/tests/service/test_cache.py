"""The response cache: what is the same, what is kept, and who waits for whom."""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from time import monotonic, time
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer, field_validator

from app import inference
from app.api.bodies import Bodies
from app.api.json_route import Call, Endpoint, JsonRoute, Rules
from app.api.keys import ApiKeys
from app.cache import Answered, ResponseCache, Stores, Times
from app.errors import (
    DeadlineExceeded,
    NotReady,
    Overloaded,
    PredictionFailed,
    ServiceError,
)
from app.known_bodies import MAX_BODY_BYTES
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.tickets import Outlet, Ticket
from tests.service.server import FAKES, Service, Start, publish
from tests.service.test_batches import sample

FAR = 1e9

IDENTITIES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2
)


class Features(BaseFeatures):
    x: float
    name: str = ""


class Other(Features):
    count: int = 0


class Answer(BasePrediction):
    y: float


class Asked:
    """The ticket of rows that the model was asked for."""

    def __init__(self, outlet: Outlet[BasePrediction | ItemError]) -> None:
        self.outlet = outlet
        self.was_in_vain = False
        self.deadline = 0.0

    def prolong(self, deadline: float) -> None:
        self.deadline = max(deadline, self.deadline)

    def withdraw(self) -> None:
        self.was_in_vain = not self.outlet.done()
        self.outlet.cancel()


class Model:
    """Is asked, and answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []
        self.tickets: list[Asked] = []

    def submit(
        self, rows: Sequence[BaseFeatures], outlet: Outlet[BasePrediction | ItemError]
    ) -> Ticket[BasePrediction | ItemError]:
        self.asked.append([row.x for row in rows])  # type: ignore[attr-defined]
        self.tickets.append(Asked(outlet))
        return self.tickets[-1]

    def say(self, run: int = -1, *outcomes: BasePrediction | ItemError) -> None:
        twice = [Answer(y=2 * x) for x in self.asked[run]]
        assert not self.tickets[run].outlet.done(), "nobody waits"
        self.tickets[run].outlet.set_result(outcomes or twice)


def cache(**changes: Any) -> ResponseCache:
    given: dict[str, Any] = {
        "identity": ["model", "1"],
        "types": (Features, Answer),
        "times": Times(60),
    }
    given |= {"stores": Stores(MemoryStore(1_000_000)), "metrics": CacheMetrics("tested", "1")}
    return ResponseCache(**(given | changes))


def served(cached: ResponseCache, asked: Model, **more: Any) -> Any:
    """What `inference` and a route need of a served model; `asked` answers in the next turn."""

    def submit(rows: Any, _: float, outlet: Any, **__: Any) -> Any:
        ticket: Any = asked.submit(rows, outlet)
        ticket.timings = None
        asyncio.get_running_loop().call_soon(asked.say, len(asked.asked) - 1)
        return ticket

    outlet = asyncio.get_running_loop().create_future
    its: dict[str, Any] = {"values": None, "metrics": None, "admit": lambda *_: None}
    its["is_trivial"] = True
    its |= {"cache": cached, "version": "1", "submit": submit, "outlet": outlet}
    return SimpleNamespace(**(its | more))


def ask(
    cached: ResponseCache, model: Model, *xs: float, deadline: float = FAR, refresh: bool = False
) -> asyncio.Task[Answered]:
    rows = [Features(x=x) for x in xs]
    return asyncio.create_task(cached.answer(rows, model.submit, deadline, refresh=refresh))


def ys(answered: Answered) -> list[float]:
    outcomes, _, _ = answered
    return [outcome.y for outcome in outcomes]  # type: ignore[union-attr]


def age_s(answered: Answered) -> float | None:
    return answered[1]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    # Who waits for nobody would wait for ever.
    asyncio.run(asyncio.wait_for(test(), 30))


class TestAnswers:
    def test_a_row_is_asked_for_once_and_known_after(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            first = ask(cached, model, 1)
            await settle()
            model.say()
            assert age_s(await first) is None
            second = await ask(cached, model, 1)
            assert ys(second) == ys(await first) == [2]
            assert 0 <= (age_s(second) or 0) < 60
            assert age_s(second) is not None
            assert model.asked == [[1]]

        run(test)

    def test_who_asks_before_an_answer_is_kept_gets_it_too(self) -> None:
        class QuickModel(Model):
            def submit(
                self, rows: Sequence[BaseFeatures], outlet: Outlet[BasePrediction | ItemError]
            ) -> Ticket[BasePrediction | ItemError]:
                ticket = super().submit(rows, outlet)
                self.say()
                return ticket

        async def test() -> None:
            cached, model = cache(), QuickModel()
            # Each is answered as soon as it asks, all in one turn of the event loop.
            answers = [ask(cached, model, 1), ask(cached, model, 1), ask(cached, model, 2, 1)]
            assert [ys(answer) for answer in await asyncio.gather(*answers)] == [[2], [2], [4, 2]]
            assert model.asked == [[1], [2]]
            assert age_s(await ask(cached, model, 1, 2)) is not None

        run(test)

    def test_of_many_rows_only_those_that_are_not_known(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            first = ask(cached, model, 2, 4)
            await settle()
            model.say()
            await first
            many = ask(cached, model, 1, 2, 3, 4, 3)
            await settle()
            assert model.asked[1:] == [[1, 3]]
            model.say()
            assert ys(await many) == [2, 4, 6, 8, 6]
            assert age_s(await many) is None
            assert age_s(await ask(cached, model, 3, 2, 1)) is not None

        run(test)

    @given(IDENTITIES, IDENTITIES)
    @settings(deadline=None)
    def test_keys_are_equal_for_the_same_identity_alone(
        self, one: list[str], other: list[str]
    ) -> None:
        async def test() -> None:
            keys = [cache(identity=parts).key(Features(x=1)) for parts in (one, list(one), other)]
            assert keys[0] == keys[1]
            assert (keys[0] == keys[2]) is (one == other)

        run(test)

    @pytest.mark.parametrize(
        "changes",
        [
            {"identity": ["model", "2"]},
            {"identity": ["mode", "l1"]},
            {"types": (Other, Answer)},
        ],
    )
    def test_another_model_sees_none_of_them(self, changes: dict[str, Any]) -> None:
        async def test() -> None:
            store, model = MemoryStore(1_000_000), Model()
            first = ask(cache(stores=Stores(store)), model, 1)
            await settle()
            model.say()
            await first
            other = cache(stores=Stores(store), **changes)
            row_type = changes.get("types", (Features,))[0]
            second = asyncio.create_task(other.answer([row_type(x=1.0)], model.submit, FAR))
            await settle()
            assert len(model.asked) == 2
            model.say()
            await second

        run(test)

    def test_what_cannot_be_scored_is_not_kept(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            for _ in range(2):
                asked = ask(cached, model, 1, 2)
                await settle()
                model.say(-1, *[ItemError("no") for _ in model.asked[-1]])
                assert (await asked)[0] == [ItemError("no"), ItemError("no")]
            assert model.asked == [[1, 2], [1, 2]]

        run(test)

    @pytest.mark.parametrize("y", ["two", object()], ids=["warns", "raises"])
    def test_nor_is_what_cannot_be_said_in_json(self, y: object) -> None:
        said = Answer.model_construct(y=y)  # type: ignore[arg-type]

        async def test() -> None:
            cached, model = cache(), Model()
            for run in range(2):
                asking = [ask(cached, model, 1) for _ in range(1 + run)]
                await settle()
                model.say(run, said)
                assert all([(await asked)[0][0] is said for asked in asking])
                await settle()
            assert model.asked == [[1], [1]]

        run(test)

    def test_a_body_that_was_noted_is_answered_as_long_as_its_row_is_known(self) -> None:
        async def test() -> None:
            model, memory = Model(), MemoryStore(1_000_000)
            cached = cache(stores=Stores(memory))
            row, body, long = Features(x=1), b'{"x": 1}', b" " * (MAX_BODY_BYTES + 1)
            asking = asyncio.create_task(cached.answer([row], model.submit, FAR))
            await settle()
            model.say()
            await asking
            await settle()
            assert cached.bodies
            assert cached.bodies.key_of(body) is None
            for noted in (body, long):
                cached.note_body(noted, row)
            key = cached.bodies.key_of(body)
            assert key
            recalled = cached.recall(key)
            assert recalled
            assert recalled.content == b'{"y":2.0}'
            assert 0 <= recalled.age_s < 60
            assert cached.bodies.key_of(long) is None
            memory.discard(key)
            assert cached.recall(key) is None

        run(test)

    def test_what_was_a_hit_is_recalled_by_its_body_unless_its_row_is_to_be_seen(self) -> None:
        async def test() -> None:
            cached, values, asked = cache(), SimpleNamespace(may_skip=True, skips=0), Model()
            values.note = lambda *_: None
            values.skip = lambda: setattr(values, "skips", values.skips + 1)
            model = served(cached, asked, values=values)
            terms: Any = SimpleNamespace(
                body=b"1", use="normal", deadline=FAR, priority=0, is_alone=False
            )
            bodies = cached.bodies
            assert bodies
            for status in ("miss", "hit"):
                assert bodies.key_of(terms.body) is None
                assert (await inference.predict(model, [Features(x=1)], terms)).cache == status
                await settle()
            key = bodies.key_of(terms.body)
            assert key
            recalled = inference.recall(model, key, terms)
            assert recalled
            assert (recalled.cache, recalled.content) == ("hit", b'{"y":2.0}')
            assert (values.skips, len(asked.asked)) == (1, 1)
            for use in ("refresh", "none"):
                other: Any = SimpleNamespace(**(vars(terms) | {"use": use}))
                assert inference.recall(model, key, other) is None
            values.may_skip = False
            assert inference.recall(model, key, terms) is None

        run(test)

    def test_who_asks_what_another_asks_for_already_goes_with_its_run(self) -> None:
        async def test() -> None:
            cached, asked = cache(), Model()
            model = served(cached, asked)
            terms: Any = SimpleNamespace(
                body=None, use="normal", deadline=FAR, priority=0, is_alone=False
            )
            rows = [Features(x=1)]
            asking = [inference.predict(model, rows, terms) for _ in range(3)]
            answers = await asyncio.gather(*asking)
            assert asked.asked == [[1]]
            assert [ys((answer.outcomes, None, None)) for answer in answers] == [[2]] * 3
            # And who is not to be told what is known does not.
            terms.use = "refresh"
            assert (await inference.predict(model, rows, terms)).cache == "bypass"
            assert asked.asked == [[1], [1]]

        run(test)

    def test_a_route_does_not_read_a_body_again_whose_answer_was_a_hit(self) -> None:
        class Body(BaseModel):
            features: Features

        read: list[Body] = []

        def rows_of(body: Body) -> list[BaseFeatures]:
            read.append(body)
            return [body.features]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b'{"features": {"x": 1}}'}

        async def test() -> None:
            endpoint = Endpoint(Body, Body, rows_of, lambda *_: b"", "", {}, takes_one_row=True)
            rules = Rules(30, ApiKeys([]), Bodies(1000, 1000))
            route = JsonRoute("/predict", endpoint, served(cache(), Model()), rules)
            for status in ("miss", "hit", "hit"):
                call = Call("1", monotonic(), {b"content-type": b"application/json"})
                await route.answer(call, receive)
                assert call.cache == status
                await settle()
            assert len(read) == 2

        run(test)

    def test_what_is_too_old_is_asked_again(self) -> None:
        async def test() -> None:
            store, model = MemoryStore(1_000_000), Model()
            cached = cache(stores=Stores(store), times=Times(60))
            key = cached.key(Features(x=1))
            for age, is_known in ((59, True), (-4, True), (61, False), (-60, False)):
                store.put({key: cached._value(key, b'{"y": 2}', time() - age)})
                asked = ask(cached, model, 1)
                await settle()
                assert bool(model.asked) is not is_known
                if not is_known:
                    model.say()
                assert ys(await asked) == [2]
                assert (age_s(await asked) is not None) is is_known

        run(test)

    @pytest.mark.parametrize("order", [(1, 0), (0, 1)], ids=["refresh first", "older first"])
    def test_an_older_run_does_not_override_a_refresh(self, order: tuple[int, int]) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            before = ask(cached, model, 1)
            await settle()
            fresh = ask(cached, model, 1, refresh=True)
            await settle()
            for number in order:
                model.say(number, Answer(y=[2, 777][number]))
                await settle()
            assert ys(await before) == [2]
            assert ys(await fresh) == [777]
            assert ys(await ask(cached, model, 1)) == [777]
            assert len(model.asked) == 2

        run(test)

    def test_refreshing_asks_and_keeps(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            for refresh, y in ((False, 1), (True, 2)):
                asked = ask(cached, model, 1, refresh=refresh)
                await settle()
                model.say(-1, Answer(y=y))
                assert ys(await asked) == [y]
            assert ys(await ask(cached, model, 1)) == [2]

        run(test)

    def test_a_prediction_that_cannot_be_read_again_is_refused_beforehand(self) -> None:
        class Writes(BasePrediction):
            y: float

            @field_serializer("y")
            def _write(self, value: float) -> str:
                return f"{value} apples"

        class Doubles(BasePrediction):
            y: float

            @field_validator("y")
            @classmethod
            def _double(cls, value: float) -> float:
                return 2 * value

        async def test() -> None:
            for each in (Writes(y=1), Doubles(y=0)):
                with pytest.raises(ValueError, match="of its own"):
                    cache(types=(Features, type(each))).check(Features(x=1), each)
            cache().check(Features(x=1), Answer(y=1))

        run(test)


class TestFlights:
    def test_a_thousand_who_ask_the_same_are_one_run(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            requests = [ask(cached, model, 1) for _ in range(1000)]
            await settle()
            model.say()
            assert {ys(answered)[0] for answered in await asyncio.gather(*requests)} == {2}
            assert model.asked == [[1]]

        run(test)

    @pytest.mark.parametrize("leavers", [[0], [5], [0, 1, 2, 3], [*range(1, 10)], [*range(9)]])
    def test_also_when_the_first_leaves(self, leavers: list[int]) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            requests = [ask(cached, model, 1) for _ in range(10)]
            await settle()
            for number in leavers:
                requests[number].cancel()
            await settle()
            model.say()
            stayed = [task for number, task in enumerate(requests) if number not in leavers]
            assert all(ys(answered) == [2] for answered in await asyncio.gather(*stayed))
            assert model.asked == [[1]]
            assert all(requests[number].cancelled() for number in leavers)

        run(test)

    def test_also_when_the_first_is_in_a_hurry(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            first = ask(cached, model, 1, deadline=monotonic() + 0.01)
            patient = [ask(cached, model, 1) for _ in range(3)]
            with pytest.raises(DeadlineExceeded):
                await first
            assert model.tickets[0].deadline == FAR
            model.say()
            assert all(ys(answered) == [2] for answered in await asyncio.gather(*patient))
            assert model.asked == [[1]]

        run(test)

    def test_what_cannot_be_kept_is_said_all_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: object) -> None:
            raise MemoryError

        async def test() -> None:
            cached, model = cache(), Model()
            monkeypatch.setattr(cached, "_put", full)
            requests = [ask(cached, model, 1) for _ in range(3)]
            await settle()
            with pytest.raises(MemoryError):
                model.say()
            assert [ys(answered) for answered in await asyncio.gather(*requests)] == [[2]] * 3

        run(test)

    def test_when_all_leave_the_model_is_spared(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            requests = [ask(cached, model, 1) for _ in range(3)]
            await settle()
            for request in requests:
                request.cancel()
            late = ask(cached, model, 1)
            await settle()
            assert [ticket.was_in_vain for ticket in model.tickets] == [True, False]
            assert model.asked == [[1], [1]]
            model.say()
            assert ys(await late) == [2]

        run(test)

    def test_what_befell_the_first_alone_is_not_passed_on(self) -> None:
        error = DeadlineExceeded("late")

        async def test() -> None:
            cached, model = cache(), Model()
            requests = [ask(cached, model, 1) for _ in range(5)]
            await settle()
            model.tickets[0].outlet.set_exception(error)
            await settle()
            assert model.asked == [[1], [1]], "one of those who are left asks for all of them"
            model.say()
            with pytest.raises(type(error)):
                await requests[0]
            assert all(ys(answer) == [2] for answer in await asyncio.gather(*requests[1:]))

        run(test)

    @pytest.mark.parametrize("fails_again", [False, True])
    def test_whose_leader_fails_ask_once_more_together(self, fails_again: bool) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            leader, *followers = [ask(cached, model, 1) for _ in range(5)]
            await settle()
            model.tickets[0].outlet.set_exception(PredictionFailed("broken"))
            await settle()
            assert model.asked == [[1], [1]]
            if fails_again:
                model.tickets[1].outlet.set_exception(PredictionFailed("broken"))
            else:
                model.say()
            answers = await asyncio.gather(leader, *followers, return_exceptions=True)
            failed = [answer for answer in answers if isinstance(answer, PredictionFailed)]
            assert answers[0] in failed
            assert len(failed) == (5 if fails_again else 1)
            assert len({id(answer) for answer in failed}) == len(failed), "each has one of its own"
            assert len(model.asked) == 2
            if fails_again:
                again = ask(cached, model, 1)
                await settle()
                assert len(model.asked) == 3, "it is not kept"
                model.say()
                await again

        run(test)

    @pytest.mark.parametrize("error", [Overloaded("full", 1.5), NotReady("no")])
    def test_a_refusal_is_everybodys(self, error: ServiceError) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            requests = [ask(cached, model, 1) for _ in range(3)]
            await settle()
            model.tickets[0].outlet.set_exception(error)
            answers = await asyncio.gather(*requests, return_exceptions=True)
            assert [str(answer) for answer in answers] == [str(error)] * 3
            assert [answer.__dict__ for answer in answers] == [error.__dict__] * 3
            assert model.asked == [[1]]

        run(test)

    def test_unless_it_may_be_that_of_another_row(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            first = ask(cached, model, 1, -1)
            await settle()
            follower = ask(cached, model, 1)
            await settle()
            model.tickets[0].outlet.set_exception(PredictionFailed("one of them"))
            await settle()
            with pytest.raises(PredictionFailed):
                await first
            assert model.asked == [[1, -1], [1]]
            model.say()
            assert ys(await follower) == [2]

        run(test)

    def test_it_leaves_nothing_for_the_garbage_collector(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()

            async def fail() -> None:
                requests = [ask(cached, model, 1) for _ in range(3)]
                await settle()
                for _ in range(2):
                    model.tickets.pop().outlet.set_exception(PredictionFailed("broken"))
                    await settle()
                await asyncio.gather(*requests, return_exceptions=True)

            await fail()
            gc.collect()
            await fail()
            assert gc.collect() == 0

        run(test)

    def test_who_follows_has_a_deadline_of_its_own(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            first = ask(cached, model, 1)
            await settle()
            hurried = ask(cached, model, 1, deadline=monotonic() + 0.02)
            with pytest.raises(DeadlineExceeded):
                await hurried
            model.say()
            assert ys(await first) == [2]
            assert model.asked == [[1]]

        run(test)

    def test_who_comes_before_the_first_has_woken_up_shares_its_answer(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            first = ask(cached, model, 1)
            await settle()
            second = ask(cached, model, 1)
            model.say()
            assert ys(await second) == ys(await first) == [2]
            assert model.asked == [[1]]

        run(test)

    def test_rows_of_several_flights_come_together_in_order(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            one, two = ask(cached, model, 1), ask(cached, model, 2)
            await settle()
            many = ask(cached, model, 3, 2, 1)
            await settle()
            assert model.asked == [[1], [2], [3]]
            for number in (2, 0, 1):
                model.say(number)
                await settle()
            assert ys(await many) == [6, 4, 2]
            assert ys(await one) + ys(await two) == [2, 4]

        run(test)

    def test_what_is_refused_leaves_nothing_behind(self) -> None:
        async def test() -> None:
            cached, model = cache(), Model()

            def refuse(*_: object) -> Any:
                raise NotReady("no")

            with pytest.raises(NotReady):
                await cached.answer([Features(x=1)], refuse, FAR)
            asked = ask(cached, model, 1)
            await settle()
            model.say()
            assert ys(await asked) == [2]

        run(test)


def runs(service: Service, version: str = "1") -> float:
    """Rows that the model was run on, beside those of the warm-up."""
    return sample(service, "inference_batch_size_sum", model="double", version=version)


def double(service: Service, x: float, **headers: str) -> httpx.Response:
    return service.client.post("/v1/predict", json={"features": {"x": x}}, headers=headers)


class TestHttp:
    def test_the_second_time_it_is_a_hit(self, start: Start) -> None:
        service = start().wait_for("/ready")
        before = runs(service)
        first, second = double(service, 1), double(service, 1.0)
        assert first.headers["x-cache"] == "miss"
        assert "age" not in first.headers
        assert second.headers["x-cache"] == "hit"
        assert 0 <= int(second.headers["age"]) < 60
        assert first.json()["prediction"] == second.json()["prediction"] == {"y": 2}
        assert first.json()["request_id"] != second.json()["request_id"]
        assert runs(service) == before + 1
        labels = {"model": "double", "version": "1"}
        assert sample(service, "cache_hits_total", tier="memory", **labels) == 1
        assert sample(service, "cache_misses_total", **labels) == 1

    def test_so_it_is_without_reading_the_body_again(self, start: Start) -> None:
        service = start().wait_for("/ready")

        def post(path: str = "/v1/predict", kind: str = "application/json", **headers: str) -> Any:
            headers |= {"Content-Type": kind}
            return service.client.post(path, content=b'{"features": {"x": 4}}', headers=headers)

        before = runs(service)
        answers = [post() for _ in range(4)]
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", *3 * ["hit"]]
        assert {answer.json()["prediction"]["y"] for answer in answers} == {8}
        assert len({answer.json()["request_id"] for answer in answers}) == 4
        assert all(0 <= int(answer.headers["age"]) < 60 for answer in answers[1:])
        labels = {"model": "double", "version": "1"}
        assert sample(service, "cache_hits_total", tier="memory", **labels) == 3
        assert sample(service, "inference_requests_total", outcome="ok", **labels) == 4
        assert post("/v1/models/double/predict").headers["x-cache"] == "hit"
        assert runs(service) == before + 1
        # What would have been refused still is.
        assert post("/v1/predict/batch").status_code == 422
        assert post("/v1/models/faulty/predict").status_code == 422
        assert post(kind="text/plain").status_code == 415
        assert post(**{"X-Request-Timeout-Ms": "soon"}).status_code == 422
        assert post(**{"Cache-Control": "no-cache"}).headers["x-cache"] == "bypass"
        assert runs(service) == before + 2

    def test_a_batch_asks_for_what_it_lacks(self, start: Start) -> None:
        service = start().wait_for("/ready")
        double(service, 2)
        before = runs(service)
        body = {"instances": [{"x": x} for x in (1, 2, 3, 1)]}
        statuses = []
        for _ in range(2):
            answer = service.client.post("/v1/predict/batch", json=body)
            assert [row["y"] for row in answer.json()["predictions"]] == [2, 4, 6, 2]
            statuses.append(answer.headers["x-cache"])
        assert statuses == ["miss", "hit"]
        assert runs(service) == before + 2

    def test_the_caller_may_pass_it_by(self, start: Start) -> None:
        service = start().wait_for("/ready")
        double(service, 1)
        before = runs(service)
        for control in ("no-cache", "max-age=0, No-Cache", "no-store"):
            answer = double(service, 1, **{"Cache-Control": control})
            assert answer.headers["x-cache"] == "bypass"
        assert runs(service) == before + 3
        assert double(service, 1, **{"Cache-Control": "max-age=60"}).headers["x-cache"] == "hit"
        double(service, 5, **{"Cache-Control": "no-store"})
        assert double(service, 5).headers["x-cache"] == "miss"
        double(service, 6, **{"Cache-Control": "no-cache"})
        assert double(service, 6).headers["x-cache"] == "hit"
        labels = {"model": "double", "version": "1"}
        assert sample(service, "cache_bypasses_total", **labels) == 5

    def test_also_in_several_lines(self, start: Start) -> None:
        service = start().wait_for("/ready")
        lines = [("Cache-Control", "no-store"), ("Cache-Control", "max-age=0")]
        body: Any = {"features": {"x": 7}}
        answer = service.client.post("/v1/predict", json=body, headers=lines)
        assert answer.headers["x-cache"] == "bypass"
        assert double(service, 7).headers["x-cache"] == "miss"

    def test_what_it_holds_is_told(self, start: Start) -> None:
        service = start().wait_for("/ready")
        assert sample(service, "cache_bytes") == 0
        double(service, 1)
        service.wait_until(lambda: sample(service, "cache_bytes") > 0)
        held = sample(service, "cache_bytes")
        assert held < 1000
        for x in range(2, 102):
            double(service, x)
        service.wait_until(lambda: sample(service, "cache_bytes") > 90 * held)

    def test_errors_are_not_kept(self, service: Service) -> None:
        for fault in ("raise", "item"):
            before = sample(service, "cache_misses_total", model="faulty", version="1")
            for _ in range(2):
                assert service.predict("faulty", fault=fault).status_code in (500, 422)
            after = sample(service, "cache_misses_total", model="faulty", version="1")
            assert after == before + 2

    def test_it_can_be_switched_off(self, start: Start) -> None:
        service = start(CACHE_ENABLED="false").wait_for("/ready")
        assert "x-cache" not in double(service, 1).headers
        assert "x-cache" not in double(service, 1).headers

    def test_also_for_one_model(self, service: Service) -> None:
        assert "x-cache" not in service.predict("gate", pipe="/dev/null").headers
        assert "x-cache" in service.predict("double", x=1).headers

    def test_it_expires(self, start: Start) -> None:
        service = start(CACHE_TTL_S="0.05").wait_for("/ready")
        double(service, 1)
        service.wait_until(lambda: double(service, 1).headers["x-cache"] == "miss")

    def test_a_model_whose_rows_cannot_be_told_apart_is_not_cached(
        self, start: Start, tmp_path: Path
    ) -> None:
        source = (FAKES / "double.py").read_text()
        source = source.replace("import Field", "import Field, SecretStr")
        source = source.replace('note: str = ""', 'note: SecretStr = SecretStr("")')
        (tmp_path / "predictors").mkdir()
        (tmp_path / "predictors/double.py").write_text(source)
        publish(tmp_path / "artifacts", "double", factor_txt=b"2")
        service = start(
            PREDICTORS_DIR=tmp_path / "predictors", ARTIFACTS_DIR=tmp_path / "artifacts"
        ).wait_for("/ready")
        assert "x-cache" not in double(service, 1).headers
        [line] = [line for line in service.log_lines() if "not cached" in line["event"]]
        assert "SecretStr" in line["event"]
