"""A token bucket: so much a second on average, and what was saved up at once.

https://en.wikipedia.org/wiki/Token_bucket
"""

from collections.abc import Callable
from time import monotonic

REFILL_S = 0.1


class TokenBucket:
    """Holds `most` at once, and is full at first.

    It is filled up ten times a second, and not all the time, so that where there is little, those
    who get some get it at the same moment.
    """

    def __init__(self, per_s: float, most: float, clock: Callable[[], float] = monotonic) -> None:
        self._per_s, self._most = per_s, most
        self._clock = clock
        self._tokens = most
        self._filled_at = clock()

    def take(self, tokens: int) -> int:
        """So many of them as there are."""
        now = self._clock()
        seconds = now - self._filled_at
        if seconds >= REFILL_S:
            self._filled_at = now
            self.give(seconds * self._per_s)
        taken = min(tokens, int(self._tokens))
        self._tokens -= taken
        return taken

    def give(self, tokens: float) -> None:
        """Let so many more be taken."""
        self._tokens = min(self._most, self._tokens + tokens)
