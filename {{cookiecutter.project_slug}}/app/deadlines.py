"""Many deadlines on one timer."""

import asyncio
from collections.abc import Callable, Hashable
from contextvars import Context
from time import monotonic
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)


class Deadlines(Generic[ItemT]):
    """Calls `expire` with each item whose deadline passes before it is discarded.

    Nearly everything ends long before its deadline, so a timer of its own for each would be made
    only to be cancelled, which takes longer than all else the collector does for a request. Here
    the timer stands at the earliest deadline known, and is set anew when it rings.
    """

    def __init__(
        self, expire: Callable[[ItemT], None], clock: Callable[[], float] = monotonic
    ) -> None:
        self._expire = expire
        self._clock = clock
        self._deadlines: dict[ItemT, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = float("inf")

    @property
    def earliest(self) -> float:
        """No deadline is before this."""
        return self._rings_at

    def add(self, item: ItemT, deadline: float) -> None:
        """`deadline` is by `monotonic`, which timers go by, too; infinity never passes."""
        self._deadlines[item] = deadline
        if deadline < self._rings_at:
            self._set_timer(deadline)

    def discard(self, item: ItemT) -> None:
        self._deadlines.pop(item, None)

    def items(self) -> list[ItemT]:
        return list(self._deadlines)

    def _set_timer(self, at: float) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._rings_at = at
        if at != float("inf"):
            # In a context of its own, not in that of the request that happened to set it.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(at, self._ring, context=Context())

    def _ring(self) -> None:
        now = self._clock()
        passed = [item for item, deadline in self._deadlines.items() if deadline <= now]
        for item in passed:
            del self._deadlines[item]
        self._timer = None
        self._set_timer(min(self._deadlines.values(), default=float("inf")))
        for item in passed:
            self._expire(item)
