"""The response cache: what is the same, and what is kept."""

import asyncio
from collections.abc import Sequence
from time import monotonic, time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer, field_validator

from app import inference
from app.api.bodies import Bodies
from app.api.json_route import Call, Endpoint, JsonRoute, Rules
from app.api.keys import ApiKeys
from app.cache import Stores, Times
from app.errors import DeadlineExceeded, PredictionFailed
from app.known_bodies import MAX_BODY_BYTES
from app.memory_store import MemoryStore
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.tickets import Outlet, Ticket
from tests.service.caching import (
    FAR,
    Answer,
    Features,
    Model,
    Other,
    age_s,
    ask,
    cache,
    run,
    served,
    settle,
    terms_of,
    ys,
)

IDENTITIES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2
)


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

    @pytest.mark.parametrize("error", [PredictionFailed("no"), DeadlineExceeded("late")])
    def test_what_fails_or_is_late_is_not_kept(self, error: Exception) -> None:
        async def test() -> None:
            cached, model = cache(), Model()
            for number in range(2):
                asked = ask(cached, model, 1)
                await settle()
                model.tickets[number].outlet.set_exception(error)
                with pytest.raises(type(error)):
                    await asked
                await settle()
            assert model.asked == [[1], [1]]

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

    @pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
    @pytest.mark.parametrize("y", ["two", object()], ids=["warns", "raises"])
    def test_nor_is_what_cannot_be_said_in_json(self, y: object) -> None:
        said = Answer.model_construct(y=y)  # type: ignore[arg-type]

        async def test() -> None:
            cached, model = cache(), Model()
            for others in range(2):
                asking = [ask(cached, model, 1) for _ in range(1 + others)]
                await settle()
                model.say(others, said)
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
            terms = terms_of(body=b"1")
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
                assert inference.recall(model, key, terms_of(body=b"1", use=use)) is None
            values.may_skip = False
            assert inference.recall(model, key, terms) is None

        run(test)

    def test_who_asks_what_another_asks_for_already_goes_with_its_run(self) -> None:
        async def test() -> None:
            cached, asked = cache(), Model()
            model = served(cached, asked)
            terms = terms_of()
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
