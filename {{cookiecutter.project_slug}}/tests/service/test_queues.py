"""What is ahead of a row that comes to a queue."""

import itertools
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.queues import ANY, Queues, Request
from app.tickets import Timings

MAX_ROWS = 4


def waiting(*groups: tuple[int, str, int]) -> Queues[str, str]:
    """Requests of a priority, a shape and so many rows each, in order."""

    def expire(_: Request[str, str]) -> None:
        raise AssertionError("none is too late")

    queues: Queues[str, str] = Queues(expire)
    for number, (priority, shape, rows) in enumerate(groups):
        add(queues, number, priority, shape, rows)
    return queues


def add(queues: Queues[str, str], number: int, priority: int, shape: str, rows: int) -> None:
    outlet: Any = Future()
    timings = Timings(number)
    queues.add(Request([shape] * rows, 1.0, (priority, shape), number, outlet, timings, rows))


def batches_until(queues: Queues[str, str], number: int) -> int:
    taken = iter(lambda: queues.take(MAX_ROWS, 0.0), [])
    has_it = [any(part.request.number == number for part in parts) for parts in taken]
    return has_it.index(True)


class TestBatchesBefore:
    @pytest.mark.parametrize(
        ("shape", "batches", "rows"), [("a", 3, 8), ("b", 2, 6), ("c", 3, 9), ("d", 4, 10)]
    )
    def test_only_rows_of_one_shape_share_them(self, shape: str, batches: int, rows: int) -> None:
        queues = waiting((0, "a", 1), (0, "b", 3), (0, "c", 1), (0, "a", 5))
        assert queues.batches_before(0, shape, MAX_ROWS) == (batches, rows)
        assert queues.batches_before(0, ANY, MAX_ROWS) == (2, 8)

    def test_what_is_left_of_a_shape_keeps_its_turn(self) -> None:
        queues = waiting((0, "a", 6), (0, "b", 1))
        assert [part.rows for part in queues.take(MAX_ROWS, 0.0)] == [["a"] * 4]
        assert queues.batches_before(0, "a", MAX_ROWS) == (0, 0)
        assert queues.batches_before(0, "b", MAX_ROWS) == (1, 2)

    def test_of_a_shape_with_many_the_last_batch_is_joined(self) -> None:
        rare = [(0, shape, 1) for shape in "cdefg"]
        assert waiting((0, "a", 5), *rare).batches_before(0, "a", MAX_ROWS) == (1, 4)
        assert waiting(*rare, (0, "a", 5)).batches_before(0, "a", MAX_ROWS) == (6, 9)

    @pytest.mark.parametrize(("priority", "batches"), [(0, 1), (1, 2), (2, 2)])
    def test_the_less_urgent_are_not_before_the_urgent(self, priority: int, batches: int) -> None:
        queues = waiting((0, "a", 5), (1, "b", 1), (1, "a", 2))
        assert queues.batches_before(priority, "a", MAX_ROWS)[0] == batches

    @given(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc")), max_size=3),
        st.integers(0, 2),
        st.sampled_from("abc"),
    )
    def test_is_right_where_each_shape_has_room_in_one(
        self, groups: list[tuple[int, str]], priority: int, shape: str
    ) -> None:
        queues = waiting(*((its, same, 1) for its, same in groups))
        expected, _ = queues.batches_before(priority, shape, MAX_ROWS)
        add(queues, len(groups), priority, shape, 1)
        assert batches_until(queues, len(groups)) == expected


def test_each_row_is_taken_once_by_priority_shape_and_arrival() -> None:
    queues = waiting((1, "a", 3), (0, "b", 3), (1, "b", 6), (0, "a", 2))
    taken = iter(lambda: queues.take(MAX_ROWS, 0.0), [])
    batches = [[(part.request.number, len(part.rows)) for part in parts] for parts in taken]
    assert batches == [[(1, 3), (2, 1)], [(3, 2), (0, 2)], [(0, 1)], [(2, 4)], [(2, 1)]]
    assert queues.rows == 0
    rows: itertools.chain[Any] = itertools.chain.from_iterable(batches)
    assert sum(count for _, count in rows) == 14
