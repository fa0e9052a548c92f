"""What waits for a model: the rows of requests, in queues by priority and shape. Knows no clock."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import inf
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

from app.tickets import Outlet, Timings

RowT = TypeVar("RowT")
OutcomeT = TypeVar("OutcomeT")

Group = tuple[int, Hashable]
"""Priority, the smaller one first, and shape key: only equal keys share a batch."""

ANY: Hashable = object()
"""A shape that is not known yet."""

Turn = tuple[float, float]
"""Priority and number of the request that a batch begins with; the smaller one goes first."""


@dataclass(eq=False)
class Request(Generic[RowT, OutcomeT]):
    """Rows that one caller waits for. They may end up in several batches, in order."""

    rows: Sequence[RowT]
    deadline: float
    group: Group
    number: int
    """By order of arrival."""

    outlet: Outlet[OutcomeT]
    timings: Timings
    waiting: int
    """Rows that are in no batch yet."""

    answered: int = field(default=0, init=False)
    outcomes: dict[int, Sequence[OutcomeT]] | None = field(default=None, init=False)
    """By the number of their first row; batches may end in another order than they began."""


class Part(NamedTuple, Generic[RowT, OutcomeT]):
    """The rows of a request that are in one batch."""

    request: Request[RowT, OutcomeT]
    first: int
    rows: Sequence[RowT]


Parts = list[Part[RowT, OutcomeT]]


class Queues(Generic[RowT, OutcomeT]):
    """Requests with rows that are in no batch yet.

    Args:
        expire: called with each that is found to be too late, or to be wanted by nobody any more,
            when it is its turn; has to `remove` it.
    """

    def __init__(self, expire: Callable[[Request[RowT, OutcomeT]], None]) -> None:
        self.rows = 0
        self._expire = expire
        self._queues: dict[Group, OrderedDict[Request[RowT, OutcomeT], None]] = {}
        self._rows: dict[Group, int] = {}

    @property
    def are_one(self) -> bool:
        return len(self._queues) == 1

    @property
    def oldest(self) -> float:
        """When the first of those that wait came; there has to be one."""
        return min([next(iter(queue)).timings.queued for queue in self._queues.values()])

    def batches_before(self, priority: float, shape: Hashable, max_rows: int) -> tuple[int, int]:
        """About how many begin before that of one more row, and how many rows they have.

        Of another shape whose turn is before, all rows count, also those that came later. Of `ANY`
        shape it is told for one that shares batches with all that waits.
        """
        rows_of: dict[Hashable, int] = {}
        turn_of: dict[Hashable, Turn] = {}
        last: Turn = (0, 0)
        for (its_priority, its_shape), queue in self._queues.items():
            if its_priority <= priority:
                turn = its_priority, next(iter(queue)).number
                turn_of[its_shape] = min(turn, turn_of.get(its_shape, turn))
                rows = self._rows[its_priority, its_shape]
                rows_of[its_shape] = rows_of.get(its_shape, 0) + rows
                if its_shape == shape:
                    last = max(last, (its_priority, next(reversed(queue)).number))
        if shape is ANY:
            full = sum(rows_of.values()) // max_rows
            return full, full * max_rows
        full, others = divmod(rows_of.pop(shape, 0), max_rows)
        own: Turn = (priority, inf)
        if others:
            # It joins those of its shape; when there are many, the last of them.
            own = last if full else turn_of[shape]
        before = [rows for its_shape, rows in rows_of.items() if turn_of[its_shape] < own]
        batches = sum([-(-rows // max_rows) for rows in before])
        return full + batches, full * max_rows + sum(before)

    def add(self, request: Request[RowT, OutcomeT]) -> None:
        queue = self._queues.get(request.group)
        if queue is None:
            queue = self._queues[request.group] = OrderedDict()
            self._rows[request.group] = 0
        queue[request] = None
        self._count(request.group, request.waiting)

    def remove(self, request: Request[RowT, OutcomeT]) -> bool:
        """Whether it was there."""
        queue = self._queues.get(request.group)
        if not queue or request not in queue:
            return False
        del queue[request]
        self._count(request.group, -request.waiting)
        if not queue:
            self._forget(request.group)
        return True

    def take(self, max_rows: int, now: float) -> Parts[RowT, OutcomeT]:
        """Up to `max_rows` rows of one shape, by priority and arrival."""
        parts: Parts[RowT, OutcomeT] = []
        room = max_rows
        for group in self._next_groups(now):
            queue = self._queues[group]
            while room and (request := self._head(queue, now)):
                rows, first = request.rows, len(request.rows) - request.waiting
                if first or request.waiting > room:
                    rows = rows[first : first + room]
                parts.append(Part(request, first, rows))
                request.waiting -= len(rows)
                self._count(group, -len(rows))
                room -= len(rows)
                if not request.waiting:
                    del queue[request]
            # Unless the last one had expired.
            if not queue and group in self._queues:
                self._forget(group)
        return parts

    def _next_groups(self, now: float) -> list[Group]:
        """All of the shape whose turn it is, by priority."""
        groups = list(self._queues.items())
        heads = {group: head.number for group, queue in groups if (head := self._head(queue, now))}
        if not heads:
            return []
        _, shape = min(heads, key=lambda group: (group[0], heads[group]))
        return sorted((group for group in heads if group[1] == shape), key=itemgetter(0))

    def _head(
        self, queue: OrderedDict[Request[RowT, OutcomeT], None], now: float
    ) -> Request[RowT, OutcomeT] | None:
        """The first that is to be run; those before it are taken out."""
        while queue:
            request = next(iter(queue))
            if not request.outlet.done() and now < request.deadline:
                return request
            self._expire(request)
        return None

    def _count(self, group: Group, more: int) -> None:
        self.rows += more
        self._rows[group] += more

    def _forget(self, group: Group) -> None:
        del self._queues[group], self._rows[group]
