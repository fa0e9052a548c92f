"""The collector, on a clock that jumps and with a model that is held: who shares a batch, when."""

import asyncio
import gc
import random
import selectors
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from math import inf
from typing import Any, ClassVar

import pytest
from prometheus_client import REGISTRY

from app.batching import MAX_RERUNS, Collector, Limits
from app.errors import DeadlineExceeded, NotReady, OutOfMemory, Overloaded, PredictionFailed
from app.metrics import ModelMetrics
from app.tickets import outcomes_of
from app.waiting import WORTH_A_WAIT_S, BatchCost, FixedWindow, LearnedReturns, WaitPolicy

FAR = 1e6

name: ContextVar[str] = ContextVar("name")


class JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a time to come, moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for ever"
            self.now += timeout
        return ready


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run on a loop whose clock moves only when there is nothing to do."""
    selector = JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        loop.run_until_complete(asyncio.wait_for(test, FAR / 2))
    finally:
        loop.close()


class Model:
    """Takes a time for a batch; fails where a row is "poison" or there are more than `memory`."""

    memory = 1000

    def __init__(self, fixed: float = 1.0, per_row: float = 0.0) -> None:
        self.batches: list[list[Any]] = []
        self.running = 0
        self.most_running = 0
        self._fixed, self._per_row = fixed, per_row

    def __call__(self, rows: list[Any]) -> "asyncio.Future[Sequence[Any]]":
        self.batches.append(rows)
        return asyncio.ensure_future(self._predict(rows))

    async def _predict(self, rows: list[Any]) -> Sequence[Any]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await asyncio.sleep(self._fixed + self._per_row * len(rows))
        finally:
            self.running -= 1
        if len(rows) > self.memory:
            raise OutOfMemory("no memory")
        if "poison" in rows:
            raise PredictionFailed("poisoned")
        return [f"{row}!" for row in rows]


def never() -> WaitPolicy:
    return FixedWindow(0, BatchCost())


class WaitsUntilTold(FixedWindow):
    is_over = False

    def plan(self, now: float, *_: float) -> tuple[float, float]:
        return (now if self.is_over else now + 5), inf


Run = Callable[[list[Any]], "asyncio.Future[Sequence[Any]]"]


def collector(model: Run, **limits: Any) -> Any:
    policy: WaitPolicy = limits.pop("policy", None) or never()
    defaults = {"max_rows": 4, "queue_max_rows": 1000, "max_wait": 100.0}
    return Collector[Any, Any](
        model,
        Limits(**(defaults | limits)),
        policy,
        ModelMetrics("tested", "1"),
        clock=asyncio.get_running_loop().time,
    )


async def ask(
    collector: Any, rows: Sequence[Any], deadline: float, **options: Any
) -> Sequence[Any]:
    options["group"] = (options.pop("priority", 0), options.pop("shape_key", None))
    return await outcomes_of(lambda outlet: collector.enqueue(rows, deadline, outlet, **options))


def submit(
    collector: Any, *rows: Any, deadline: float = FAR, **options: Any
) -> "asyncio.Task[Sequence[Any]]":
    return asyncio.create_task(ask(collector, list(rows), deadline, **options))


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)


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


class TestFailing:
    @pytest.mark.parametrize("poison", [{0}, {3}, {7}, {2, 5}, {0, 1, 2}])
    def test_only_the_requests_at_fault_fail(self, poison: set[int]) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model, max_rows=8)
            rows = ["poison" if number in poison else number for number in range(8)]
            requests = [submit(collecting, row) for row in rows]
            answers = await asyncio.gather(*requests, return_exceptions=True)
            for number, answer in enumerate(answers):
                if number in poison:
                    assert isinstance(answer, PredictionFailed)
                else:
                    assert answer == [f"{number}!"]
            errors = [id(answer) for answer in answers if isinstance(answer, Exception)]
            assert len(set(errors)) == len(poison), "an exception object is shared"
            assert len(model.batches) <= 1 + MAX_RERUNS

        run(test())

    def test_the_search_for_the_fault_is_bounded(self) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model, max_rows=200, queue_max_rows=200)
            requests = [submit(collecting, "poison") for _ in range(200)]
            answers = await asyncio.gather(*requests, return_exceptions=True)
            assert all(isinstance(answer, PredictionFailed) for answer in answers)
            assert len(model.batches) <= 1 + MAX_RERUNS

        run(test())

    def test_a_fault_of_any_other_kind_leaves_nobody_waiting(self) -> None:
        async def test() -> None:
            async def broken(rows: list[Any]) -> Sequence[Any]:
                raise ZeroDivisionError(rows)

            collecting = collector(lambda rows: asyncio.ensure_future(broken(rows)))
            for _ in range(2):
                with pytest.raises(PredictionFailed):
                    await submit(collecting, "a")

        run(test())

    def test_nor_does_one_before_there_is_a_run(self) -> None:
        async def test() -> None:
            def broken(_: list[Any]) -> "asyncio.Future[Sequence[Any]]":
                raise RuntimeError("no more threads")

            collecting = collector(broken)
            for _ in range(2):
                with pytest.raises(PredictionFailed):
                    await submit(collecting, "a")
            assert collecting.is_idle

        run(test())


class TestCounting:
    """What cannot be seen in an answer."""

    labels: ClassVar = {"model": "tested", "version": "1"}

    def counted(self, name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, self.labels | labels) or 0

    def test_runs_of_halves(self) -> None:
        async def test() -> None:
            before = self.counted("inference_bisections_total")
            collecting = collector(Model())
            requests = [submit(collecting, row) for row in ("a", "b", "c", "poison")]
            await asyncio.gather(*requests, return_exceptions=True)
            # Of two and two, and of the two at fault one by one.
            assert self.counted("inference_bisections_total") == before + 4

        run(test())

    @pytest.mark.parametrize(
        ("reason", "deadline"), [("queue_full", FAR), ("deadline", 5.0), ("not_ready", FAR)]
    )
    def test_refusals(self, reason: str, deadline: float) -> None:
        async def test() -> None:
            before = self.counted("inference_rejected_total", reason=reason)
            collecting = collector(Model(fixed=10), queue_max_rows=4)
            await submit(collecting, "a")
            requests = [submit(collecting, "a")]
            await settle()
            requests += [submit(collecting, *"bcd")]
            await settle()
            if reason == "not_ready":
                collecting.drain()
            rows = "e" if reason == "deadline" else "ef"
            with pytest.raises((Overloaded, NotReady)):
                await ask(collecting, rows, asyncio.get_running_loop().time() + deadline)
            await settle()
            assert self.counted("inference_rejected_total", reason=reason) == before + 1
            await asyncio.gather(*requests)

        run(test())


class TestMemory:
    """A model that runs out of it is asked for less."""

    def test_the_batch_is_run_again_in_halves_and_later_ones_are_smaller(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 5
            collecting = collector(model, max_rows=8)
            # One request goes across the halves.
            requests = [submit(collecting, *"abc"), submit(collecting, *"defgh")]
            assert await asyncio.gather(*requests) == [
                ["a!", "b!", "c!"],
                ["d!", "e!", "f!", "g!", "h!"],
            ]
            assert [len(batch) for batch in model.batches] == [8, 4, 4]
            assert await submit(collecting, *range(6)) == [f"{row}!" for row in range(6)]
            assert [len(batch) for batch in model.batches[3:]] == [4, 2]

        run(test())

    def test_it_is_tried_once(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 1
            collecting = collector(model, max_rows=8)
            with pytest.raises(PredictionFailed):
                await submit(collecting, *range(8))
            assert [len(batch) for batch in model.batches] == [8, 4]
            # It gets there in the end.
            for _ in range(2):
                await asyncio.wait([submit(collecting, *range(8))])
            assert await submit(collecting, *range(8)) == [f"{row}!" for row in range(8)]

        run(test())

    def test_one_row_that_is_too_large_fails_and_changes_nothing(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 0
            collecting = collector(model)
            with pytest.raises(OutOfMemory, match="no memory"):
                await submit(collecting, "a")
            assert collecting.limits.max_rows == 4

        run(test())


class TestAllowedSizes:
    @pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
    def test_a_batch_is_filled_up_to_the_next(self, rows: int, size: int) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model, max_rows=8, allowed_sizes=(1, 4, 8))
            answer = await submit(collecting, *range(rows))
            assert answer == [f"{row}!" for row in range(rows)]
            assert [len(batch) for batch in model.batches] == [size]

        run(test())

    def test_memory_leaves_the_smaller_ones(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 4
            collecting = collector(model, max_rows=8, allowed_sizes=(1, 3, 8))
            answer = await submit(collecting, *range(7))
            assert answer == [f"{row}!" for row in range(7)]
            assert [len(batch) for batch in model.batches] == [8, 3, 3, 1]
            assert collecting.limits.max_rows == 3

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


def test_a_failure_leaves_nothing_for_the_garbage_collector() -> None:
    async def test() -> None:
        collecting = collector(Model())

        async def fail() -> None:
            try:
                await ask(collecting, ["poison"], FAR)
            except PredictionFailed:
                return

        await fail()
        gc.collect()
        await fail()
        assert gc.collect() == 0

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
        assert waits[-1] == 0

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
            assert asyncio.get_running_loop().time() == 2.5
            await asyncio.gather(*too_many, *waiting)

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
