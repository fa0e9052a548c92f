"""The collector, on a clock that jumps and with a model that is held: who shares a batch, when."""

import asyncio
import random
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import pytest

from app.errors import DeadlineExceeded, NotReady, Overloaded
from app.waiting import WORTH_A_WAIT_S, BatchCost, FixedWindow
from tests.service.collecting import (
    FAR,
    Model,
    ask,
    collector,
    run,
    settle,
    submit,
)

name: ContextVar[str] = ContextVar("name")


class TestBinding:
    def test_an_idle_model_is_asked_at_once(self) -> None:
        async def test() -> None:
            model = Model()
            request = submit(collector(model), "a")
            assert await request == ["a!"]
            assert asyncio.get_running_loop().time() == 1

        run(test())

    def test_what_comes_while_it_runs_shares_the_next_batch(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            requests = [submit(collecting, "a")]
            await settle()
            requests += [submit(collecting, row) for row in "bcdef"]
            answers = await asyncio.gather(*requests)
            assert answers == [["a!"], ["b!"], ["c!"], ["d!"], ["e!"], ["f!"]]
            assert model.batches == [["a"], ["b", "c", "d", "e"], ["f"]]

        run(test())

    def test_a_request_keeps_its_place_and_its_order_when_it_is_split(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            large = submit(collecting, *range(9))
            small = submit(collecting, "b")
            assert await large == [f"{number}!" for number in range(9)]
            assert await small == ["b!"]
            assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, "b"]]

        run(test())

    def test_slots_run_side_by_side_and_rows_stay_in_order(self) -> None:
        async def test() -> None:
            chance = random.Random(1)

            async def uneven(rows: list[Any]) -> Sequence[Any]:
                await asyncio.sleep(chance.random())
                return rows

            collecting = collector(lambda rows: asyncio.ensure_future(uneven(rows)), slots=3)
            assert await submit(collecting, *range(50)) == list(range(50))
            model = Model()
            await asyncio.gather(*(submit(collector(model, slots=2), *range(8)) for _ in "a"))
            assert model.most_running == 2

        run(test())

    def test_only_equal_shapes_share_a_batch_and_none_starves(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            first = submit(collecting, "x")
            await settle()
            odd = submit(collecting, "odd", shape_key="odd")
            others = [submit(collecting, f"e{number}", shape_key="even") for number in range(9)]
            await asyncio.gather(first, odd, *others)
            assert model.batches[1] == ["odd"]
            assert [len(batch) for batch in model.batches] == [1, 1, 4, 4, 1]

        run(test())

    def test_the_turn_of_a_shape_is_not_lost_to_one_that_came_too_late(self) -> None:
        async def test() -> None:
            model = Model(fixed=10)
            collecting = collector(model)
            first = submit(collecting, "x")
            await settle()
            late = submit(collecting, "late", priority=0, shape_key="a", deadline=9.0)
            low = submit(collecting, "low", priority=7, shape_key="a")
            high = submit(collecting, "high", priority=1, shape_key="b")
            await asyncio.gather(first, low, high, late, return_exceptions=True)
            assert model.batches == [["x"], ["high"], ["low"]]

        run(test())

    def test_who_comes_alone_to_an_idle_model_is_taken_at_once(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            alone = submit(collecting, "a", is_alone=True)
            await asyncio.sleep(0)
            assert model.batches == [["a"]]
            beside = submit(collecting, "b", is_alone=True)
            await asyncio.sleep(0)
            assert model.batches == [["a"]]
            assert [await alone, await beside] == [["a!"], ["b!"]]
            with pytest.raises(DeadlineExceeded):
                await submit(collecting, "late", is_alone=True, deadline=0.0)
            assert model.batches == [["a"], ["b"]]

        run(test())

    def test_a_full_batch_is_taken_at_once(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            outlets = [collecting.outlet() for _ in "abcde"]
            for row, outlet in zip("abcde", outlets, strict=True):
                collecting.enqueue([row], FAR, outlet)
            assert model.batches == [["a", "b", "c", "d"]]
            await asyncio.gather(*outlets)
            assert model.batches == [["a", "b", "c", "d"], ["e"]]
            assert model.most_running == 1

        run(test())

    def test_and_not_on_behalf_of_the_one_that_filled_it(self) -> None:
        async def test() -> None:
            seen: list[str] = []
            model = Model()

            def run(rows: list[Any]) -> "asyncio.Future[Sequence[Any]]":
                seen.append(name.get("nobody"))
                return model(rows)

            collecting = collector(run)
            outlets = [collecting.outlet() for _ in "abcd"]
            for row, outlet in zip("abcd", outlets, strict=True):
                name.set(row)
                collecting.enqueue([row], FAR, outlet)
            assert seen == ["nobody"]
            await asyncio.gather(*outlets)

        run(test())

    def test_unless_the_model_would_hold_up_the_loop(self) -> None:
        async def test() -> None:
            cost = BatchCost()
            cost.ran(4, WORTH_A_WAIT_S)
            model = Model()
            collecting = collector(model, policy=FixedWindow(0, cost))
            full = [submit(collecting, row) for row in "abcd"]
            await asyncio.sleep(0)
            assert collecting.rows_waiting == 4
            assert not model.batches
            await asyncio.gather(*full)
            assert model.batches == [["a", "b", "c", "d"]]

        run(test())

    def test_or_some_of_it_is_to_be_in_another(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            low = [submit(collecting, row, priority=5) for row in "abc"]
            high = [submit(collecting, row, priority=1) for row in "xyz"]
            await asyncio.gather(*low, *high)
            assert model.batches == [["x", "y", "z", "a"], ["b", "c"]]

        run(test())

    def test_nor_does_a_start_that_is_due_for_one_who_has_gone(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            submitted = [collecting.outlet() for _ in range(3)]
            collecting.enqueue(["gone"], FAR, submitted[0]).withdraw()
            collecting.enqueue(["a"], FAR, submitted[1], is_alone=True)
            collecting.enqueue(["b"], FAR, submitted[2])
            await asyncio.gather(*submitted[1:])
            assert model.most_running == 1

        run(test())

    def test_a_smaller_priority_goes_first_and_the_others_fill_up(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            first = submit(collecting, "x")
            await settle()
            low = [submit(collecting, f"low{number}", priority=5) for number in range(4)]
            high = submit(collecting, "high", priority=1)
            await asyncio.gather(first, high, *low)
            assert model.batches[1] == ["high", "low0", "low1", "low2"]

        run(test())


class TestLeaving:
    def test_who_leaves_the_queue_never_reaches_the_model(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model)
            requests = [submit(collecting, row) for row in "abc"]
            await settle()
            left, stays = submit(collecting, "left"), submit(collecting, "stays")
            await settle()
            left.cancel()
            await settle()
            assert collecting.rows_waiting == 1
            assert await stays == ["stays!"]
            assert model.batches == [["a", "b", "c"], ["stays"]]
            await asyncio.gather(*requests)

        run(test())

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_who_leaves_a_batch_touches_nobody_else(self, number: int) -> None:
        async def test() -> None:
            requests = [submit(collecting := collector(Model()), "a")]
            requests += [submit(collecting, row) for row in "bc"]
            await settle()
            requests[number].cancel()
            answers = await asyncio.gather(*requests, return_exceptions=True)
            assert isinstance(answers.pop(number), asyncio.CancelledError)
            expected = [["a!"], ["b!"], ["c!"]]
            assert answers == [*expected[:number], *expected[number + 1 :]]
            assert collecting.is_idle

        run(test())

    def test_when_all_leave_the_next_is_served(self) -> None:
        async def test() -> None:
            collecting = collector(Model())
            requests = [submit(collecting, row) for row in "abc"]
            await settle()
            for request in requests:
                request.cancel()
            assert await submit(collecting, "d") == ["d!"]

        run(test())

    def test_leaving_in_the_turn_of_the_answer_is_no_error(self) -> None:
        async def test() -> None:
            collecting = collector(Model())
            request = submit(collecting, "a")
            asyncio.get_running_loop().call_at(1, request.cancel)
            await asyncio.wait([request])
            assert await submit(collecting, "b") == ["b!"]

        run(test())


class TestOverload:
    def test_a_full_queue_refuses_and_says_when_to_come_back(self) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=10), queue_max_rows=8)
            await submit(collecting, "a")
            requests = [submit(collecting, "a")]
            await settle()
            requests += [submit(collecting, *"bcde") for _ in range(2)]
            await settle()
            with pytest.raises(Overloaded) as caught:
                await ask(collecting, ["f"], FAR)
            # One batch runs and two wait, of ten seconds each.
            assert caught.value.headers == {"Retry-After": "30"}
            await asyncio.gather(*requests)

        run(test())

    def test_who_could_not_be_served_in_time_is_refused_at_once(self) -> None:
        async def test() -> None:
            loop = asyncio.get_running_loop()
            collecting = collector(Model(fixed=10))
            await submit(collecting, "a")
            requests = [submit(collecting, "a")]
            await settle()
            # It would take twenty seconds, and what is expected is not certain.
            for timeout in (15, 22):
                with pytest.raises(Overloaded) as caught:
                    await ask(collecting, ["b"], loop.time() + timeout)
                assert caught.value.headers == {"Retry-After": "10"}
            requests.append(submit(collecting, "c", deadline=loop.time() + 23))
            await asyncio.gather(*requests)

        run(test())

    def test_who_does_not_have_to_wait_needs_no_more_time_than_a_batch(self) -> None:
        async def test() -> None:
            loop = asyncio.get_running_loop()
            collecting = collector(Model(fixed=10), slots=2)
            await submit(collecting, "a")
            requests = [submit(collecting, "b")]
            await settle()
            requests.append(submit(collecting, "c", deadline=loop.time() + 11))
            await asyncio.gather(*requests)

        run(test())

    @pytest.mark.parametrize("others", [[], ["x"]], ids=["in a batch", "in the queue"])
    def test_a_deadline_can_be_put_off(self, others: list[str]) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=10))
            requests = [submit(collecting, row) for row in others]
            await settle()
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            ticket = collecting.enqueue(["a"], 5.0, answer)
            await settle()
            ticket.prolong(50.0)
            ticket.prolong(1.0)
            assert await answer == ["a!"]
            await asyncio.gather(*requests)

        run(test())

    def test_a_backlog_that_expired_is_forgotten(self) -> None:
        async def test() -> None:
            loop = asyncio.get_running_loop()
            model = Model(fixed=10)
            collecting = collector(model, max_rows=1)
            requests = [submit(collecting, "a")]
            await settle()
            requests.append(submit(collecting, "b"))
            requests += [submit(collecting, row, deadline=15.0) for row in "cd"]
            await asyncio.gather(*requests, return_exceptions=True)
            await asyncio.sleep(1000)
            requests = [submit(collecting, "e")]
            await settle()
            requests.append(submit(collecting, "f", deadline=loop.time() + 30))
            await asyncio.gather(*requests)
            assert model.batches == [["a"], ["b"], ["e"], ["f"]]

        run(test())

    def test_what_expires_in_the_queue_never_reaches_the_model(self) -> None:
        async def test() -> None:
            model = Model(fixed=10)
            collecting = collector(model)
            first = submit(collecting, "a")
            await settle()
            # Nothing is known yet of what a batch takes, so it is let in.
            with pytest.raises(DeadlineExceeded):
                await submit(collecting, "b", deadline=5.0)
            await first
            assert model.batches == [["a"]]

        run(test())

    def test_what_expires_in_a_batch_is_told_so_in_time_and_spares_the_others(self) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=10))
            hasty, patient = submit(collecting, "a", deadline=5.0), submit(collecting, "b")
            with pytest.raises(DeadlineExceeded):
                await hasty
            assert asyncio.get_running_loop().time() == 5
            assert await patient == ["b!"]

        run(test())

    def test_a_deadline_cuts_the_wait_short(self) -> None:
        async def test() -> None:
            collecting = collector(Model(), policy=FixedWindow(50, BatchCost()))
            assert await submit(collecting, "a", deadline=60.0) == ["a!"]
            began = asyncio.get_running_loop().time()
            # Its caller is not the one who has waited longest.
            patient = submit(collecting, "b")
            await settle()
            assert await submit(collecting, "c", deadline=began + 5.0) == ["c!"]
            assert asyncio.get_running_loop().time() < began + 5
            assert await patient == ["b!"]

        run(test())

    def test_nor_do_rows_that_make_the_batch_longer_cost_a_deadline(self) -> None:
        class WaitsForMany(FixedWindow):
            def plan(self, now: float, *_: float) -> tuple[float, float]:
                return now + 10, 30

        async def test() -> None:
            cost = BatchCost()
            for rows in (1, 32):
                cost.ran(rows, 5 + rows)
            model, policy = Model(fixed=5, per_row=1), WaitsForMany(10, cost)
            collecting = collector(model, max_rows=32, policy=policy)
            requests = []
            for _ in range(25):
                requests.append(submit(collecting, "a", deadline=30.0))
                await asyncio.sleep(0.4)
            assert await requests[0] == ["a!"]
            await asyncio.gather(*requests, return_exceptions=True)

        run(test())

    def test_the_urgent_wait_for_the_urgent_alone(self) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=10))
            await submit(collecting, "a")
            requests = [submit(collecting, "b")]
            await settle()
            requests += [submit(collecting, *range(20), priority=7)]
            await settle()
            deadline = asyncio.get_running_loop().time() + 25
            with pytest.raises(Overloaded) as caught:
                await submit(collecting, "c", priority=7, deadline=deadline)
            assert caught.value.headers == {"Retry-After": "60"}
            assert await submit(collecting, "c", priority=0, deadline=deadline) == ["c!"]
            await asyncio.gather(*requests)
            assert collecting.expected_wait(7) == 0

        run(test())

    def test_rows_of_many_shapes_are_expected_to_take_a_batch_for_each(self) -> None:
        async def test() -> None:
            collecting, loop = collector(Model(fixed=10)), asyncio.get_running_loop()
            requests = []
            for number in range(300):
                deadline, shape_key = loop.time() + 60, number % 20
                requests.append(submit(collecting, "a", deadline=deadline, shape_key=shape_key))
                await asyncio.sleep(1)
            ends = await asyncio.gather(*requests, return_exceptions=True)
            # The first came before it was known what a batch takes, and are in the others' way.
            assert {type(end) for end in ends[60:]} == {list, Overloaded}
            assert sum(type(end) is list for end in ends) > 60

        run(test())

    def test_batches_of_few_rows_are_expected_to_take_less_than_full_ones(self) -> None:
        async def test() -> None:
            model = Model(fixed=1, per_row=1)
            collecting, loop = collector(model, max_rows=32), asyncio.get_running_loop()
            for rows in (1, 32):
                collecting.cost.ran(rows, 1.0 + rows)
            requests = [submit(collecting, *range(32))]
            await settle()
            requests += [submit(collecting, "a", shape_key=shape) for shape in range(20)]
            await settle()
            began = loop.time()
            expected = collecting.expected_wait(0, "new")
            requests.append(submit(collecting, "a", shape_key="new"))
            while ["b"] not in model.batches:
                requests.append(submit(collecting, "b", shape_key="last"))
                await requests[-1]
            assert expected == pytest.approx(33 + 20 * 2)
            await asyncio.gather(*requests)
            assert loop.time() - began == pytest.approx(expected + 2 + 2)

        run(test())

    def test_of_many_rows_all_batches_count(self) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=10))
            await submit(collecting, "a")
            requests = [submit(collecting, "b")]
            await settle()
            now = asyncio.get_running_loop().time()
            with pytest.raises(Overloaded):
                await submit(collecting, *range(9), deadline=now + 40)
            requests += [submit(collecting, *range(9), deadline=now + 45)]
            await asyncio.gather(*requests)

        run(test())

    @pytest.mark.parametrize(
        ("slots", "rows", "cost"),
        [(1, 4, 14), (1, 5, 25), (1, 8, 28), (2, 5, 14), (2, 8, 14), (2, 9, 25), (2, 13, 28)],
    )
    def test_what_they_take_is_counted_by_rounds_of_all_slots(
        self, slots: int, rows: int, cost: float
    ) -> None:
        async def test() -> None:
            collecting = collector(Model(), slots=slots)
            for known in (1, 4):
                collecting.cost.ran(known, 10.0 + known)
            assert collecting._own_cost(rows) == pytest.approx(cost)

        run(test())


class TestStopping:
    def test_draining_answers_what_was_taken_and_takes_no_more(self) -> None:
        async def test() -> None:
            collecting = collector(Model())
            requests = [submit(collecting, row) for row in "abcdef"]
            await settle()
            collecting.drain()
            with pytest.raises(NotReady):
                await ask(collecting, ["g"], FAR)
            assert len(await asyncio.gather(*requests)) == 6

        run(test())

    def test_closing_leaves_nobody_waiting(self) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=FAR))
            requests = [submit(collecting, row) for row in "abcdef"]
            await settle()
            collecting.close()
            answers = await asyncio.gather(*requests, return_exceptions=True)
            assert all(isinstance(answer, NotReady) for answer in answers)

        run(test())
