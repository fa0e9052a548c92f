"""For whom a free model waits, and for how long."""

import asyncio
import random
import socket

import pytest

from app.waiting import BatchCost, FixedWindow, LearnedReturns, WaitPolicy
from tests.service.collecting import (
    FAR,
    Model,
    WaitsUntilTold,
    ask,
    collector,
    never,
    run,
    settle,
    submit,
)


class TestWaiting:
    """What the learned wait is worth, on a model of 11 ms and 0.1 ms for each row."""

    @staticmethod
    async def closed_loop(clients: int, policy: WaitPolicy) -> tuple[float, int]:
        """Answers a second, and the most batches that one answer took, of the second half."""
        loop = asyncio.get_running_loop()
        model = Model(fixed=0.011, per_row=0.0001)
        collecting = collector(model, max_rows=32, max_wait=0.01, policy=policy)
        chance = random.Random(1)
        start = loop.time()
        answered = most = 0

        async def client() -> None:
            nonlocal answered, most
            while loop.time() < start + 20:
                await asyncio.sleep(chance.uniform(0.0001, 0.001))
                began = loop.time()
                await ask(collecting, ["x"], FAR)
                if began > start + 10:
                    answered += 1
                    most = max(most, round((loop.time() - began) / 0.0111))

        await asyncio.gather(*(client() for _ in range(clients)))
        return answered / 10, most

    @pytest.mark.parametrize(("clients", "better"), [(1, 1.0), (2, 1.5), (8, 1.5), (32, 1.3)])
    def test_it_gathers_callers_that_come_back(self, clients: int, better: float) -> None:
        async def test() -> None:
            unwaited, _ = await self.closed_loop(clients, never())
            learned, most = await self.closed_loop(clients, LearnedReturns(32, BatchCost()))
            assert learned >= 0.99 * better * unwaited
            assert most == 1, "somebody had to wait for a batch that began without them"

        run(test())

    @pytest.mark.parametrize("max_wait", [0, 0.001, 0.005, 0.02])
    @pytest.mark.parametrize("is_learned", [True, False], ids=["learned", "window"])
    def test_at_three_quarters_of_the_capacity_nothing_piles_up(
        self, is_learned: bool, max_wait: float
    ) -> None:
        async def test() -> None:
            loop, chance, cost = asyncio.get_running_loop(), random.Random(1), BatchCost()
            policy = LearnedReturns(32, cost) if is_learned else FixedWindow(max_wait, cost)
            model = Model(fixed=0.011, per_row=0.0001)
            collecting = collector(model, max_rows=32, max_wait=max_wait, policy=policy)
            capacity = 32 / (0.011 + 32 * 0.0001)
            arrivals, waits = [], []

            async def caller() -> None:
                began = loop.time()
                await ask(collecting, ["x"], FAR)
                waits.append(loop.time() - began)

            while loop.time() < 10:
                await asyncio.sleep(chance.expovariate(0.75 * capacity))
                arrivals.append(asyncio.create_task(caller()))
            assert len(waits) > 0.99 * len(arrivals)
            await asyncio.gather(*arrivals)
            # Behind a batch that runs, for others, and in a batch of one's own.
            assert sorted(waits)[len(waits) * 99 // 100] < 2 * 32 / capacity + max_wait

        run(test())

    def test_who_came_while_the_event_loop_was_held_up_is_heard_first(self) -> None:
        async def test() -> None:
            loop = asyncio.get_running_loop()
            model = Model()
            collecting = collector(model, policy=FixedWindow(1, BatchCost()))
            ours, theirs = socket.socketpair()
            requests = [submit(collecting, "a")]

            def hold_up() -> None:
                loop._selector.now += 5  # type: ignore[attr-defined]
                theirs.send(b"b")

            with ours, theirs:
                loop.add_reader(ours, lambda: requests.append(submit(collecting, ours.recv(1))))
                loop.call_later(0.5, hold_up)
                await requests[0]
                loop.remove_reader(ours)
            assert model.batches == [["a", b"b"]]

        run(test())

    def test_it_runs_the_moment_that_all_who_were_expected_are_there(self) -> None:
        policy = LearnedReturns(32, BatchCost())
        for second in range(1, 50):
            policy.cost.ran(3, 0.01)
            policy.answered(second, 3)
            waits = []
            for came in (1, 2, 3):
                now = second + 0.001 * came
                policy.arrived(now, 1)
                waits.append(policy.plan(now, came, 32 - came, second + 0.001)[0] > now)
        assert waits == [True, True, False]

    def test_of_an_idle_model_it_waits_no_longer_than_others_mostly_came(self) -> None:
        policy = LearnedReturns(32, BatchCost())
        for second in range(1, 50):
            policy.cost.ran(32, 0.01)
            policy.found_idle(second)
            for came in range(32):
                policy.arrived(second + 0.00001 * came, 1)
            policy.answered(second + 0.02, 32)
        waits = []
        # Now there is one caller left, whose answer comes before the last of the horizons is over.
        for second in range(50, 90):
            policy.found_idle(second)
            policy.arrived(second, 1)
            now, fire_at = 0.0, float(second)
            while fire_at > now:
                now = fire_at
                fire_at, _ = policy.plan(now, 1, 31, oldest=second)
            waits.append(now - second)
            policy.answered(now + 0.009, 1)
        assert 0.0003 < waits[0] == max(waits) < 0.001
        assert not any(waits[6:])

    def test_now_and_then_alone_is_no_reason_not_to_wait(self) -> None:
        policy, chance, waits = LearnedReturns(32, BatchCost()), random.Random(3), 0
        for second in range(400):
            policy.cost.ran(8, 0.01)
            policy.found_idle(second)
            policy.arrived(second, 1)
            waits += policy.plan(second, 1, 31, second)[0] > second
            if chance.random() < 0.75:
                policy.arrived(second + 0.0005, 1)
            policy.answered(second + 0.03, 1)
        assert waits > 0.7 * 400

    def test_who_comes_after_the_horizons_is_no_reason_to_wait(self) -> None:
        policy = LearnedReturns(32, BatchCost())
        waits = 0
        for second in range(80):
            policy.cost.ran(32, 0.1)
            policy.found_idle(second)
            for came in range(32 if second < 50 else 1):
                policy.arrived(second + 0.00001 * came, 1)
            if second >= 50:
                waits += policy.plan(second, 1, 31, second)[0] > second
                policy.arrived(second + 0.05, 1)
            policy.answered(second + 0.1, 32)
        assert 0 < waits <= 6

    def test_the_plan_is_made_anew_when_there_are_enough_rows(self) -> None:
        asked = []

        class WaitsForThree(FixedWindow):
            def plan(self, now: float, rows: int, *_: float) -> tuple[float, float]:
                asked.append(rows)
                return (now if rows >= 3 else now + 5), 3

        async def test() -> None:
            collecting = collector(Model(fixed=1), policy=WaitsForThree(0, BatchCost()))
            await asyncio.gather(*[submit(collecting, row) for row in ("a", "b", "c")])
            assert asyncio.get_running_loop().time() == 1
            assert asked == [1, 3]

        run(test())

    def test_when_fewer_rows_are_allowed_fewer_are_enough(self) -> None:
        class WaitsForEight(FixedWindow):
            def plan(self, now: float, rows: int, *_: float) -> tuple[float, float]:
                return (now if rows >= 8 else now + 50), 8

        async def test() -> None:
            model, policy = Model(fixed=1), WaitsForEight(0, BatchCost())
            model.memory = 4
            collecting = collector(model, policy=policy, max_rows=8, slots=2)
            too_many = [submit(collecting, row) for row in "abcdefgh"]
            await asyncio.sleep(0.5)
            waiting = [submit(collecting, row) for row in "xyz"]
            await asyncio.sleep(1)
            await submit(collecting, "last")
            # The others had theirs after three runs.
            assert asyncio.get_running_loop().time() == 4
            await asyncio.gather(*too_many, *waiting)

        run(test())

    def test_the_longest_wait_is_from_when_there_was_a_slot(self) -> None:
        async def test() -> None:
            policy = WaitsUntilTold(0, BatchCost())
            collecting = collector(Model(fixed=1), policy=policy, slots=2, max_wait=1)
            first = submit(collecting, "a")
            await asyncio.sleep(1.5)
            # The batch before ends while this one forms, beside it.
            await submit(collecting, "b")
            assert asyncio.get_running_loop().time() == 3.5
            await first

        run(test())

    def test_a_plan_for_rows_that_have_gone_is_no_reason_to_wait(self) -> None:
        async def test() -> None:
            policy = WaitsUntilTold(0, BatchCost())
            collecting = collector(Model(fixed=1), policy=policy)
            gone = submit(collecting, "gone")
            await settle()
            gone.cancel()
            await settle()
            policy.is_over = True
            await submit(collecting, "a")
            assert asyncio.get_running_loop().time() == 1

        run(test())

    def test_it_does_not_wait_for_who_comes_by_chance(self) -> None:
        async def latencies(policy: WaitPolicy) -> list[float]:
            loop = asyncio.get_running_loop()
            collecting = collector(Model(fixed=0.011, per_row=0.0001), max_rows=32, policy=policy)
            chance = random.Random(2)
            began, taken, tasks = loop.time(), [], []

            async def client() -> None:
                at = loop.time()
                await ask(collecting, ["x"], FAR)
                taken.append(loop.time() - at)

            while loop.time() < began + 20:
                await asyncio.sleep(chance.expovariate(500))
                tasks.append(asyncio.create_task(client()))
            await asyncio.gather(*tasks)
            return sorted(taken)

        async def test() -> None:
            unwaited = await latencies(never())
            learned = await latencies(LearnedReturns(32, BatchCost()))
            assert sum(learned) / len(learned) < 1.05 * sum(unwaited) / len(unwaited)

        run(test())
