"""How long a batch that could run waits for more rows. Pure arithmetic; times are in seconds."""

from math import inf
from typing import Protocol

HORIZONS_S = tuple(0.1e-3 * 2 ** (step / 2) for step in range(15))
"""Spans after a moment in which arrivals are counted: 0.1 to 12.8 ms, by factors of root 2."""

WORTH_A_WAIT_S = 0.001
"""A batch that takes less is never waited for; it is also the least that uvloop's timers wait."""

MEMORY = 0.8
"""Weight of what was learned before against what was just seen."""

VAIN_MEMORY = 0.4
"""The same where the model was idle and nobody else came within the horizons, twice in a row: who
is alone after many waits in vain until they are forgotten."""

BACKGROUND_MARGIN = 1.3
"""Arrivals up to this multiple of the average rate are no reason to wait for more."""

RATE_SPAN_S = 0.05
"""The average rate of arrivals is renewed this often."""

NEARLY_ALL = 0.9
"""When so many of the rows that were expected are there, it is time to plan again. Each time takes
as long as a tenth of a request."""

STREAM_GAPS = 3
"""While rows come one after the other, the next is due within so many of their gaps."""


class BatchCost:
    """What a batch of n rows takes, learned as `fixed + per_row * n` from the batches that ran.

    Least squares in which a batch counts `MEMORY` times as much as the one after it.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = 0.0
        self._rows_squared = self._rows_seconds = 0.0
        self._fixed = self._per_row = 0.0

    def ran(self, rows: int, seconds: float) -> None:
        self._weight = MEMORY * self._weight + 1
        self._rows = MEMORY * self._rows + rows
        self._seconds = MEMORY * self._seconds + seconds
        self._rows_squared = MEMORY * self._rows_squared + rows * rows
        self._rows_seconds = MEMORY * self._rows_seconds + rows * seconds
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_squared / self._weight - mean_rows**2
        covariance = self._rows_seconds / self._weight - mean_rows * mean_seconds
        slope = covariance / variance if variance > 1e-9 else 0.0
        # Neither part of a real cost is negative.
        self._per_row = min(max(slope, 0.0), mean_seconds / mean_rows)
        self._fixed = mean_seconds - self._per_row * mean_rows

    def __call__(self, rows: float) -> float:
        return self._fixed + self._per_row * rows


class WaitPolicy(Protocol):
    """Told of what happens, and asked when a forming batch should run."""

    cost: BatchCost

    def arrived(self, now: float, rows: int) -> None:
        """Rows were queued."""

    def answered(self, now: float, rows: int) -> None:
        """A batch of `rows` was answered, so its callers may come back."""

    def found_idle(self, now: float) -> None:
        """Rows are about to be queued, and nothing runs or waits."""

    def plan(self, now: float, rows: int, room: int, oldest: float) -> tuple[float, float]:
        """When to run the `rows` that wait since `oldest`, which is at once unless it is after
        `now`; and how many rows, should they wait before, are enough to ask again.

        Asked again when that time has come, too, when a deadline became the earliest of all, and
        when a slot is free again. `room` is for how many more the batch has.
        """


class FixedWindow:
    """Waits until the oldest row has waited for `window` seconds."""

    def __init__(self, window: float, cost: BatchCost) -> None:
        self.cost = cost
        self._window = window

    def arrived(self, now: float, rows: int) -> None:
        pass

    def answered(self, now: float, rows: int) -> None:
        pass

    def found_idle(self, now: float) -> None:
        pass

    def plan(self, now: float, rows: int, room: int, oldest: float) -> tuple[float, float]:
        return oldest + self._window, 2 * rows


class LearnedReturns:
    """Waits for the rows that usually come after such a moment, while that pays.

    Callers that wait for an answer before they ask again come back soon after a batch was
    answered; a batch that starts without them makes them wait for all of it. So per kind of
    moment (a batch was answered; a row found the model idle) this keeps a decayed average of
    the rows that come between each horizon and the next: as a share of the rows answered, or as
    a number.
    What exceeds the average rate, as in Poisson arrivals nothing does, is worth waiting for if
    the batch that each such row is spared outweighs the delay of the rows that wait. A batch
    runs the moment that all that were expected are there. Of a model whose batches take less than
    `WORTH_A_WAIT_S` nothing is learned.
    """

    def __init__(self, max_rows: int, cost: BatchCost) -> None:
        self._max_rows = max_rows
        self.cost = cost
        self._is_quick = cost(max_rows) < WORTH_A_WAIT_S
        self._shares = {"answered": [0.0] * len(HORIZONS_S), "idle": [0.0] * len(HORIZONS_S)}
        """Rows that come from the horizon before to this one. Not from the first on: a moment can
        be over before the last horizon, of which it then says nothing."""

        self._kind = ""
        self._since = 0.0
        self._size = 1
        self._came = 0
        self._came_first = 0
        self._in_vain = 0
        """Moments of an idle model in a row in which nobody came but the first."""

        self._first = self._last = 0.0
        self._came_within: list[int] = []
        """Rows that came within each horizon that is over."""

        self._closes_at = 0.0
        """When the next horizon is over."""

        self._rate = 0.0
        self._rate_rows = 0
        self._rate_since = 0.0

    def arrived(self, now: float, rows: int) -> None:
        if self._is_quick:
            return
        if now > self._closes_at:
            self._close_horizons(now)
        if not self._came:
            self._first, self._came_first = now, rows
        self._last = now
        self._came += rows
        self._rate_rows += rows
        if now - self._rate_since >= RATE_SPAN_S:
            self._rate = (self._rate + self._rate_rows / (now - self._rate_since)) / 2
            self._rate_rows, self._rate_since = 0, now

    def answered(self, now: float, rows: int) -> None:
        self._is_quick = self.cost(self._max_rows) < WORTH_A_WAIT_S
        if not self._is_quick:
            self._begin(now, "answered", rows)

    def found_idle(self, now: float) -> None:
        # The first to come back from an answer finds the model idle, too.
        is_over = self._kind != "answered" or now - self._since > HORIZONS_S[-1]
        if is_over and not self._is_quick:
            self._begin(now, "idle", 1)

    def _begin(self, now: float, kind: str, size: int) -> None:
        if self._kind:
            self._learn(now)
        self._kind, self._since, self._size = kind, now, size
        self._came, self._came_within = 0, []
        self._closes_at = now + HORIZONS_S[0]

    def _close_horizons(self, now: float) -> None:
        while now > self._closes_at:
            self._came_within.append(self._came)
            closed = len(self._came_within)
            is_last = closed == len(HORIZONS_S)
            self._closes_at = inf if is_last else self._since + HORIZONS_S[closed]

    def _learn(self, now: float) -> None:
        self._close_horizons(now)
        shares, before = self._shares[self._kind], 0
        if self._kind == "idle" and self._came_within:
            is_vain = self._came_within[-1] <= self._came_first
            self._in_vain = self._in_vain + 1 if is_vain else 0
        is_over = self._kind == "idle" and self._in_vain > 1
        memory = VAIN_MEMORY if is_over else MEMORY
        for index, came in enumerate(self._came_within):
            # No more can come back than were answered.
            seen = min(came, self._size) if self._kind == "answered" else came
            shares[index] = memory * shares[index] + (1 - memory) * (seen - before) / self._size
            before = seen

    def plan(self, now: float, rows: int, room: int, oldest: float) -> tuple[float, float]:
        if not self._kind or room <= 0 or self._is_quick:
            return now, inf
        batch_s = self.cost(rows)
        spared = (batch_s + self.cost(0)) / 2
        passed, is_idle = now - self._since, self._kind == "idle"
        best = wait = most = expected = 0.0
        gone, most_expected = float(self._came), inf if is_idle else self._size
        for horizon, share in zip(HORIZONS_S, self._shares[self._kind], strict=True):
            # Shares of moments that were long and of others that were short can make up more.
            expected = min(expected + share * self._size, most_expected)
            left = horizon - passed
            if left <= 0 and is_idle:
                # Who was answered is about and may be late. Of who comes to an idle model that is
                # not known: who is not there when others were, does not come.
                gone = max(gone, expected)
            excess = expected - BACKGROUND_MARGIN * self._rate * horizon
            coming = min(expected - gone, excess, room)
            most = max(most, coming)
            if left <= 0 or coming < 0.5:
                continue
            # Those that are still to come wait for half of it, on average.
            gain = coming * spared - (rows + coming / 2) * left
            if gain > best:
                best, wait = gain, left
        if most >= 0.5 and self._came > 1:
            gap = STREAM_GAPS * (self._last - self._first) / (self._came - 1)
            if rows * gap < batch_s:
                wait = max(wait, self._last + gap - now)
        return now + wait, rows + max(NEARLY_ALL * most, 1)
