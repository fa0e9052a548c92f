"""A collector on a clock that jumps, with a model that takes the time that it is told to."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from math import inf
from typing import Any

from app.batching import Collector, Limits
from app.errors import OutOfMemory, PredictionFailed
from app.metrics import ModelMetrics
from app.tickets import outcomes_of
from app.waiting import BatchCost, FixedWindow, WaitPolicy

FAR = 1e6


class JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a time to come, moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for ever"
            self.now += timeout
        return ready


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run on a loop whose clock moves only when there is nothing to do."""
    selector = JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        loop.run_until_complete(asyncio.wait_for(test, FAR / 2))
    finally:
        loop.close()


class Model:
    """Takes a time for a batch; fails where a row is "poison" or there are more than `memory`."""

    memory = 1000

    def __init__(self, fixed: float = 1.0, per_row: float = 0.0) -> None:
        self.batches: list[list[Any]] = []
        self.running = 0
        self.most_running = 0
        self._fixed, self._per_row = fixed, per_row

    def __call__(self, rows: list[Any]) -> "asyncio.Future[Sequence[Any]]":
        self.batches.append(rows)
        return asyncio.ensure_future(self._predict(rows))

    async def _predict(self, rows: list[Any]) -> Sequence[Any]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await asyncio.sleep(self._fixed + self._per_row * len(rows))
        finally:
            self.running -= 1
        if len(rows) > self.memory or "huge" in rows:
            raise OutOfMemory("no memory")
        if "poison" in rows:
            raise PredictionFailed("poisoned")
        return [f"{row}!" for row in rows]


def never() -> WaitPolicy:
    return FixedWindow(0, BatchCost())


class WaitsUntilTold(FixedWindow):
    is_over = False

    def plan(self, now: float, *_: float) -> tuple[float, float]:
        return (now if self.is_over else now + 5), inf


Run = Callable[[list[Any]], "asyncio.Future[Sequence[Any]]"]


def collector(model: Run, **limits: Any) -> Any:
    policy: WaitPolicy = limits.pop("policy", None) or never()
    defaults = {"max_rows": 4, "queue_max_rows": 1000, "max_wait": 100.0}
    return Collector[Any, Any](
        model,
        Limits(**(defaults | limits)),
        policy,
        ModelMetrics("tested", "1"),
        clock=asyncio.get_running_loop().time,
    )


async def ask(
    collector: Any, rows: Sequence[Any], deadline: float, **options: Any
) -> Sequence[Any]:
    options["group"] = (options.pop("priority", 0), options.pop("shape_key", None))
    return await outcomes_of(lambda outlet: collector.enqueue(rows, deadline, outlet, **options))


def submit(
    collector: Any, *rows: Any, deadline: float = FAR, **options: Any
) -> "asyncio.Task[Sequence[Any]]":
    return asyncio.create_task(ask(collector, list(rows), deadline, **options))


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)
