"""Who asks for what the model is asked for already."""

import asyncio
import gc
from time import monotonic
from typing import Any

import pytest

from app.errors import (
    DeadlineExceeded,
    NotReady,
    Overloaded,
    PredictionFailed,
    ServiceError,
)
from tests.service.caching import FAR, Features, Model, ask, cache, run, settle, ys


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
