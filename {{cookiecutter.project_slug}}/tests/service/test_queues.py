"""What is ahead of a row that comes to a queue."""

import itertools
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any

import pytest

from app.queues import ANY, Queues, Request
from app.tickets import Timings

MAX_ROWS = 4


def waiting(*groups: tuple[int, str, int]) -> Queues[str, str]:
    """Requests of a priority, a shape and so many rows each, in order."""

    def expire(_: Request[str, str]) -> None:
        raise AssertionError("none is too late")

    queues: Queues[str, str] = Queues(expire)
    for number, (priority, shape, rows) in enumerate(groups):
        outlet: Any = Future()
        group, timings = (priority, shape), Timings(number)
        queues.add(Request([shape] * rows, 1.0, group, number, outlet, timings, rows))
    return queues


class TestBatchesBefore:
    @pytest.mark.parametrize(
        ("shape", "batches", "rows"),
        [("a", 3, 8 / 3), ("b", 2, 3), ("c", 3, 3), ("d", 4, 2.5), (ANY, 2, 4)],
    )
    def test_only_rows_of_one_shape_share_them(
        self, shape: Hashable, batches: int, rows: float
    ) -> None:
        queues = waiting((0, "a", 1), (0, "b", 3), (0, "c", 1), (0, "a", 5))
        assert queues.batches_before(0, shape, MAX_ROWS) == (batches, rows)

    def test_what_is_left_of_a_shape_comes_after_the_others(self) -> None:
        queues = waiting((0, "a", 6), (0, "b", 1))
        assert [part.rows for part in queues.take(MAX_ROWS, 0.0)] == [["a"] * 4]
        assert queues.batches_before(0, "a", MAX_ROWS) == (1, 1)
        assert queues.batches_before(0, "b", MAX_ROWS) == (0, MAX_ROWS)

    @pytest.mark.parametrize(("priority", "batches"), [(0, 1), (1, 3), (2, 3)])
    def test_the_less_urgent_are_not_before_the_urgent(self, priority: int, batches: int) -> None:
        queues = waiting((0, "a", 5), (1, "a", 3), (1, "b", 1))
        assert queues.batches_before(priority, "a", MAX_ROWS)[0] == batches


def test_each_row_is_taken_once_by_priority_shape_and_arrival() -> None:
    queues = waiting((1, "a", 3), (0, "b", 3), (1, "b", 6), (0, "a", 2))
    taken = iter(lambda: queues.take(MAX_ROWS, 0.0), [])
    batches = [[(part.request.number, len(part.rows)) for part in parts] for parts in taken]
    assert batches == [[(1, 3), (2, 1)], [(3, 2), (0, 2)], [(0, 1)], [(2, 4)], [(2, 1)]]
    assert queues.rows == 0
    rows: itertools.chain[Any] = itertools.chain.from_iterable(batches)
    assert sum(count for _, count in rows) == 14
