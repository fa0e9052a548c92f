"""What the collector makes of batches that fail: who is at fault, and how large they may be."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from contextvars import Context
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from prometheus_client import REGISTRY

from app.batching import MAX_RERUNS
from app.errors import NotReady, OutOfMemory, Overloaded, PredictionFailed
from tests.service.collecting import (
    FAR,
    Model,
    ask,
    collector,
    run,
    settle,
    submit,
)


async def assert_only_those_fail(
    collecting: Any, numbers: set[int], row: str, error: type[Exception]
) -> None:
    """Of thirty-two requests, in which `numbers` send `row`; each with an error of its own."""
    rows = [row if number in numbers else number for number in range(32)]
    requests = [submit(collecting, each) for each in rows]
    answers = await asyncio.gather(*requests, return_exceptions=True)
    for number, answer in enumerate(answers):
        if number in numbers:
            assert isinstance(answer, error)
        else:
            assert answer == [f"{number}!"]
    errors = [id(answer) for answer in answers if isinstance(answer, Exception)]
    assert len(set(errors)) == len(numbers), "an exception object is shared"


class TestFailing:
    @pytest.mark.parametrize(
        "poison", [{0}, {3}, {31}, {2, 5}, {0, 1, 2}, {0, 31}, {0, 9, 17, 26}, set(range(0, 32, 2))]
    )
    def test_only_the_requests_at_fault_fail(self, poison: set[int]) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model, max_rows=32)
            await assert_only_those_fail(collecting, poison, "poison", PredictionFailed)
            assert len(model.batches) <= 1 + MAX_RERUNS

        run(test())

    @pytest.mark.parametrize(
        ("row", "error"), [("poison", PredictionFailed), ("huge", OutOfMemory)]
    )
    def test_the_search_for_the_fault_is_bounded(self, row: str, error: type[Exception]) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model, max_rows=200, queue_max_rows=200)
            requests = [submit(collecting, row) for _ in range(200)]
            answers = await asyncio.gather(*requests, return_exceptions=True)
            assert all(isinstance(answer, error) for answer in answers)
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

    def test_who_cannot_take_an_answer_costs_the_others_neither_theirs_nor_the_slot(self) -> None:
        class Broken(asyncio.Future[Sequence[Any]]):
            def set_result(self, _: Sequence[Any], /) -> None:
                raise MemoryError

        async def test() -> None:
            collecting, broken = collector(Model()), Broken()
            collecting.enqueue(["a"], FAR, broken)
            assert await submit(collecting, "b") == ["b!"]
            with pytest.raises(PredictionFailed):
                await broken
            await settle()
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

    def test_rows_that_wait_no_more(self) -> None:
        async def test() -> None:
            collecting = collector(Model(fixed=10))
            first = submit(collecting, "a")
            await settle()
            requests = [submit(collecting, *"bc", deadline=5.0), submit(collecting, *"def")]
            await settle()
            assert self.counted("inference_queue_depth") == 5
            await asyncio.wait(requests[:1])
            assert self.counted("inference_queue_depth") == 3
            requests[1].cancel()
            await settle()
            assert self.counted("inference_queue_depth") == 0
            await first

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

    def test_a_small_one_is_run_in_halves_and_later_ones_are_half_as_large_as_before(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 1
            collecting = collector(model, max_rows=8)
            assert await submit(collecting, *"ab") == ["a!", "b!"]
            assert [len(batch) for batch in model.batches] == [2, 1, 1]
            model.memory = 8
            await submit(collecting, *range(8))
            assert [len(batch) for batch in model.batches[3:]] == [4, 4]

        run(test())

    def test_two_at_a_time_that_were_begun_before_halve_it_once(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 4
            collecting = collector(model, max_rows=8, slots=2)
            await asyncio.gather(*(submit(collecting, *range(8)) for _ in range(2)))
            assert collecting.limits.max_rows == 4

        run(test())

    def test_where_only_one_fits_all_are_answered_and_it_gets_there_in_the_end(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 1
            collecting = collector(model, max_rows=8)
            for rows in (8, 4, 2):
                assert await submit(collecting, *range(rows)) == [f"{row}!" for row in range(rows)]
                await settle()
                assert collecting.limits.max_rows == rows // 2
            assert [len(batch) for batch in model.batches[:5]] == [8, 4, 2, 1, 1]
            begun = len(model.batches)
            assert await submit(collecting, *range(8)) == [f"{row}!" for row in range(8)]
            assert [len(batch) for batch in model.batches[begun:]] == [1] * 8

        run(test())

    def test_one_row_that_is_too_large_fails_and_changes_nothing(self) -> None:
        async def test() -> None:
            model = Model()
            model.memory = 0
            collecting = collector(model)
            with pytest.raises(OutOfMemory, match="no memory"):
                await submit(collecting, "a")
            await settle()
            assert collecting.limits.max_rows == 4

        run(test())

    @pytest.mark.parametrize("allowed_sizes", [(), (8, 32), (32,)])
    @pytest.mark.parametrize("huge", [{0}, {31}, {2, 17}])
    def test_nor_does_it_take_others_along(
        self, huge: set[int], allowed_sizes: tuple[int, ...]
    ) -> None:
        async def test() -> None:
            model = Model()
            collecting = collector(model, max_rows=32, allowed_sizes=allowed_sizes)
            for _ in range(3):
                await assert_only_those_fail(collecting, huge, "huge", OutOfMemory)
                await settle()
                assert collecting.limits.max_rows == 32

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


def test_what_a_failed_run_had_at_hand_is_gone_by_the_next() -> None:
    class Array:
        pass

    def failed(arrays: "weakref.WeakSet[Array]") -> PredictionFailed:
        array = Array()
        arrays.add(array)
        try:
            raise PredictionFailed("poisoned")
        except PredictionFailed as error:
            return error

    async def test() -> None:
        arrays: weakref.WeakSet[Array] = weakref.WeakSet()
        alive = []
        # Raised out here: the frames of a run know what it answers with.
        errors = [failed(arrays)]

        def inline(rows: list[Any]) -> "asyncio.Future[Sequence[Any]]":
            alive.append(len(arrays))
            done: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
            if len(rows) > 1:
                done.set_exception(errors.pop())
            else:
                done.set_result(rows)
            return done

        collecting = collector(inline)
        assert await asyncio.gather(*[submit(collecting, row) for row in range(2)]) == [[0], [1]]
        assert alive == [1, 0, 0]

    run(test())


def test_a_trace_that_cannot_be_ended_costs_no_slot() -> None:
    async def test() -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: told.append(fault))
        collecting = collector(Model())
        trace = SimpleNamespace(context=Context(), end=None)
        collecting.tracer = SimpleNamespace(request=lambda: None, batch=lambda _: trace)
        for row in range(2):
            assert await submit(collecting, row) == [f"{row}!"]
        assert len(told) == 2

    run(test())
