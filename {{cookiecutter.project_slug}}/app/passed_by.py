"""Rows of a trivial model that are not worth looking up, as hardly any like them come again."""

import asyncio
from collections.abc import Callable
from contextvars import Context

from app.flights import Run
from app.known_bodies import MAX_BODY_BYTES
from app.token_bucket import REFILL_S, TokenBucket

VAIN_ROWS = 2000
VAIN_ROWS_PER_S = 50
ROWS_EARNED_BY_HIT = 160
"""So many rows may come in vain to a version of a model that takes hardly longer than what is done
here for them, which is a sixth of such a request: to look them up, and to keep their answers. At
once, and how many more each second, of which those of one request may take more than there are. A
hit pays for so many that it is enough if one row in sixteen is found, though of the rows that come
again few were kept before that began to pay."""

ALWAYS_ASKED = 256
"""Of one body in so many all is done, whenever it comes to a process. Of some of the requests one
would see next to none come again, as what came before them was seldom kept; of some of the bodies
as many as of all."""


class PassedBy:
    """What a version of a model is asked for as without a cache.

    Args:
        follows_from_json: whether a body tells all there is to its rows.
        count: called with how many rows there were, some times a second.
    """

    def __init__(self, *, follows_from_json: bool, count: Callable[[int], object]) -> None:
        self._follows_from_json = follows_from_json
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._bucket = TokenBucket(VAIN_ROWS_PER_S, VAIN_ROWS)
        self._may_take = True
        self._lately: dict[bytes, Run | bytes | None] = {}
        """What came in the last tenth of a second or is under way, by the body: the run, and once
        that has ended the JSON of the only prediction. None: who sends the same has no use for
        it."""

        self._rows = 0
        self._is_due = False

    def found(self) -> None:
        """A row was known, here or to another process."""
        self._bucket.give(ROWS_EARNED_BY_HIT)

    def takes(self, body: bytes, rows: int) -> bool:
        """Whether so many rows, from `body`, are to be passed by."""
        if not hash(body) % ALWAYS_ASKED or body in self._lately:
            return False
        if self._may_take:
            if self._bucket.take(rows):
                return False
            # Until it is filled up again nobody need look.
            self._may_take = False
            if not self._is_due:
                self._renew_later()
        return True

    def add(self, run: Run, rows: int) -> None:
        """So many rows are passed by; `run` has their body and is to be ended."""
        self._rows += rows
        # What is large is not to be held for longer than it is counted.
        if len(run.body) <= MAX_BODY_BYTES:
            self._lately[run.body] = run if self._follows_from_json else None
        if not self._is_due:
            self._renew_later()

    def get(self, body: bytes) -> Run | bytes | None:
        """Of the same body, if it came lately: a run, or the JSON of a prediction, that once."""
        known = self._lately.get(body)
        if isinstance(known, bytes):
            self._lately[body] = None
        return known

    def end(self, run: Run, content: bytes | None) -> None:
        """`content` is the JSON of what it came to, if that is one prediction."""
        if self._lately.get(run.body) is run:
            self._lately[run.body] = content

    def forget(self) -> None:
        """What was said is not to be said again."""
        self._lately = dict.fromkeys(self._lately)

    def _renew_later(self) -> None:
        self._is_due = True
        self._loop.call_later(REFILL_S, self._renew, context=Context())

    def _renew(self) -> None:
        self._is_due, self._may_take = False, True
        self._count(self._rows)
        self._rows = 0
        self._lately = {
            body: run
            for body, run in self._lately.items()
            if isinstance(run, Run) and not run.leader.done()
        }
        if self._lately:
            self._renew_later()
