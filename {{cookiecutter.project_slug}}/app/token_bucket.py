"""A token bucket: so much a second on average, and what was saved up at once.

https://en.wikipedia.org/wiki/Token_bucket
"""

from collections.abc import Callable
from time import monotonic

REFILL_S = 0.1


class TokenBucket:
    """Holds `most` at once, and is full at first.

    It is filled up ten times a second, and not all the time, so that those who have to do with as
    little as can be had come after one another, and can go together.
    """

    def __init__(self, per_s: float, most: float, clock: Callable[[], float] = monotonic) -> None:
        self._per_s, self._most = per_s, most
        self._clock = clock
        self._tokens = most
        self._filled_at = clock()

    def take(self, tokens: int) -> bool:
        """Whether there were any. Who takes more than there are leaves a debt."""
        now = self._clock()
        seconds = now - self._filled_at
        if seconds >= REFILL_S:
            self._filled_at = now
            self.give(seconds * self._per_s)
        if self._tokens <= 0:
            return False
        self._tokens -= tokens
        return True

    def give(self, tokens: float) -> None:
        """Let so many more be taken."""
        self._tokens = min(self._most, self._tokens + tokens)
