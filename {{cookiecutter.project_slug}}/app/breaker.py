"""A circuit breaker: what fails is left alone for a while, and then tried by one at a time."""

import random
from collections.abc import Callable
from enum import IntEnum
from time import monotonic

FAILURES = 3
"""So many in a row open the breaker."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 2.0
"""Pauses grow by half of themselves, up to this; what has recovered is in use within that."""


class State(IntEnum):
    """As the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Ask `allows` before each attempt, and say afterwards whether it `worked` or `failed`."""

    def __init__(
        self, changed: Callable[[State], object], clock: Callable[[], float] = monotonic
    ) -> None:
        self.state = State.CLOSED
        self._changed = changed
        self._clock = clock
        self._failures = 0
        self._next_pause_s = FIRST_PAUSE_S
        self._open_until = 0.0

    @property
    def pause_s(self) -> float:
        """How long until the next may try, if it is open."""
        return max(0.0, self._open_until - self._clock())

    def allows(self) -> bool:
        """Whether to try. If it is open and the pause is over, one may, and the next may not."""
        if self.state is State.CLOSED:
            return True
        if self.state is State.HALF_OPEN or self._clock() < self._open_until:
            return False
        self._become(State.HALF_OPEN)
        return True

    def worked(self) -> None:
        self._failures = 0
        self._next_pause_s = FIRST_PAUSE_S
        self._become(State.CLOSED)

    def failed(self) -> None:
        self._failures += 1
        if self.state is State.CLOSED and self._failures < FAILURES:
            return
        # Not all processes at the same moment.
        jitter = random.uniform(0.75, 1.0)  # noqa: S311 - nothing is secret about it
        self._open_until = self._clock() + self._next_pause_s * jitter
        self._next_pause_s = min(1.5 * self._next_pause_s, LONGEST_PAUSE_S)
        self._become(State.OPEN)

    def _become(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            self._changed(state)
