"""The collector under whatever may happen, in any order: everyone is answered once, and rightly."""

import asyncio
from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.batching import Collector, Limits
from app.errors import DeadlineExceeded, NotReady, OutOfMemory, Overloaded, PredictionFailed
from app.metrics import ModelMetrics
from app.waiting import BatchCost, FixedWindow, LearnedReturns
from tests.service.collecting import JumpingSelector, ask

MAX_ROWS = 4
QUEUE_MAX_ROWS = 30


class Callers(RuleBasedStateMachine):
    """Callers come, leave and wait; the model takes its time and chokes on some of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.selector = JumpingSelector()
        self.loop = asyncio.SelectorEventLoop(self.selector)
        self.loop.time = lambda: self.selector.now  # type: ignore[method-assign]
        self.seconds = 1.0
        self.is_inline = False
        """Whether the model runs on the loop, and has its answer when it is asked."""

        self.memory = MAX_ROWS
        self.next_row = 0
        self.poison: set[int] = set()
        self.huge: set[int] = set()
        self.seen: set[int] = set()
        self.gone: set[int] = set()
        """Rows whose caller left while they were in the queue."""

        self.deadlines: dict[int, float] = {}

        self.calls: dict[asyncio.Task[Sequence[int]], list[int]] = {}
        self.collector = self._collector(learned=True, slots=1)

    def _collector(self, *, learned: bool, slots: int) -> Collector[int, int]:
        cost = BatchCost()
        policy = LearnedReturns(MAX_ROWS, cost) if learned else FixedWindow(0.5, cost)
        limits = Limits(MAX_ROWS, QUEUE_MAX_ROWS, max_wait=2.0, slots=slots)

        running = 0

        def ended(_: object) -> None:
            nonlocal running
            running -= 1

        def run(rows: list[int]) -> "asyncio.Future[Sequence[int]]":
            nonlocal running
            if self.is_inline:
                return self.answered_at_once(rows)
            running += 1
            assert running <= slots, "more batches than slots"
            answer = asyncio.ensure_future(self.model(rows), loop=self.loop)
            answer.add_done_callback(ended)
            return answer

        async def create() -> Collector[int, int]:
            metrics = ModelMetrics("tested", "1")
            return Collector(run, limits, policy, metrics, clock=self.loop.time)

        return self.loop.run_until_complete(create())

    def answered_at_once(self, rows: list[int]) -> "asyncio.Future[Sequence[int]]":
        answer: asyncio.Future[Sequence[int]] = self.loop.create_future()
        try:
            self.take(rows)
            answer.set_result(self.answer(rows))
        except (OutOfMemory, PredictionFailed) as error:
            answer.set_exception(error)
        return answer

    async def model(self, rows: list[int]) -> Sequence[int]:
        self.take(rows)
        await asyncio.sleep(self.seconds)
        return self.answer(rows)

    def take(self, rows: list[int]) -> None:
        assert 1 <= len(rows) <= MAX_ROWS
        assert not self.gone & set(rows), "the model was given rows that nobody waits for"
        for row in set(rows) - self.seen:
            assert self.loop.time() < self.deadlines[row], "the model was given what is too late"
        self.seen |= set(rows)
        if len(rows) > self.memory or self.huge & set(rows):
            raise OutOfMemory("no memory")

    def answer(self, rows: list[int]) -> Sequence[int]:
        if self.poison & set(rows):
            raise PredictionFailed("poisoned")
        return [-row for row in rows]

    def turn(self, seconds: float = 0) -> None:
        """Let the loop run for a while of its own time."""

        async def wait() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            await asyncio.sleep(seconds)

        self.loop.run_until_complete(wait())

    @rule(learned=st.booleans(), slots=st.integers(1, 3))
    def reload(self, learned: bool, slots: int) -> None:
        """Another version takes over; the old one answers what it has taken."""
        self.collector.drain()
        self.collector = self._collector(learned=learned, slots=slots)

    @rule(seconds=st.sampled_from([0.001, 0.1, 1.0, 5.0]))
    def change_speed(self, seconds: float) -> None:
        self.seconds = seconds

    @rule(is_inline=st.booleans())
    def change_place(self, is_inline: bool) -> None:
        self.is_inline = is_inline

    @rule(rows=st.integers(1, MAX_ROWS))
    def change_memory(self, rows: int) -> None:
        self.memory = rows

    @rule(
        count=st.integers(1, 10),
        fault=st.integers(0, 9),
        patience=st.sampled_from([0.05, 1.0, 3.0, 1000.0]),
        manners=st.sets(st.sampled_from(["gives_up", "is_alone"])),
        group=st.tuples(st.integers(0, 1), st.sampled_from("ab")),
    )
    def come(
        self, count: int, fault: int, patience: float, manners: set[str], group: tuple[int, str]
    ) -> None:
        rows = list(range(self.next_row, self.next_row + count))
        self.next_row += count
        if fault == 0:
            self.poison.add(rows[-1])
        elif fault == 1:
            self.huge.add(rows[-1])

        deadline = self.loop.time() + patience
        self.deadlines |= dict.fromkeys(rows, deadline)
        priority, shape = group

        async def call(collector: Collector[int, int]) -> Sequence[int]:
            try:
                async with asyncio.timeout_at(deadline if "gives_up" in manners else None):
                    return await ask(
                        collector,
                        rows,
                        deadline,
                        priority=priority,
                        shape_key=shape,
                        is_alone="is_alone" in manners,
                    )
            finally:
                self.gone |= set(rows) - self.seen

        self.calls[self.loop.create_task(call(self.collector))] = rows
        self.turn()

    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        waiting = [call for call in self.calls if not call.done()]
        if waiting:
            data.draw(st.sampled_from(waiting), label="who").cancel()
            self.turn()

    @rule(seconds=st.sampled_from([0.01, 0.5, 2.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.turn(seconds)

    @invariant()
    def the_queue_is_counted_and_bounded(self) -> None:
        queues = self.collector._queues
        queued = [request for queue in queues._queues.values() for request in queue]
        rows = sum(request.waiting for request in queued)
        assert self.collector.rows_waiting == rows <= QUEUE_MAX_ROWS
        assert queues._rows.keys() == queues._queues.keys()
        for group, waiting in queues._rows.items():
            assert waiting == sum(request.waiting for request in queued if request.group == group)
        assert not [request for request in queued if request.outlet.done()]

    def teardown(self) -> None:
        self.turn(1e5)
        for call, rows in self.calls.items():
            assert call.done(), f"nobody answered {rows}"
            if call.cancelled():
                continue
            error = call.exception()
            if error is None:
                assert call.result() == [-row for row in rows]
                assert not (self.poison | self.huge) & set(rows)
            elif isinstance(error, PredictionFailed):
                assert (self.poison | self.huge) & set(rows), f"{rows} failed for another's fault"
            else:
                assert isinstance(error, (TimeoutError, DeadlineExceeded, NotReady, Overloaded))
        assert self.collector.is_idle
        assert not self.collector._accepted.items()
        self.loop.close()


TestCallers = Callers.TestCase
TestCallers.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, database=None
)
