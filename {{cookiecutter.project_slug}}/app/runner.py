"""Runs a model: on threads of its own, or on the event loop where that is cheaper."""

import asyncio
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter, thread_time
from typing import Any

from app.errors import ModelLost, PredictionFailed
from app.faults import failure
from app.predictor import (
    BaseFeatures,
    BasePrediction,
    BasePredictor,
    ItemError,
    PipelinedPredictor,
)

log = logging.getLogger(__name__)

Outcome = BasePrediction | ItemError
Rows = list[BaseFeatures]
Predictor = BasePredictor[Any, Any]

INLINE_BELOW_S = 0.003
"""A model whose largest batch takes less may run on the event loop. The hop to a thread and back
takes 0.1 ms when nothing else goes on, but when the loop is busy the thread waits for the
interpreter's lock, of which a switch takes 5 ms (sys.getswitchinterval)."""

LOCK_WAIT_S = 0.02
"""A run on a thread may have waited so long for the interpreter's lock, which is not its fault;
one that takes longer has waited for something else."""

MEMORY_RUNS = 50
"""Runs over which the time that they take is averaged."""


NICER_THAN_LOOP = 5
"""What is added to the niceness of a model's threads, see nice(2): of a core that the event loop
wants, too, they get a quarter. With half of it, under three times as many requests as can be
answered, those that are refused and the probes wait for seconds (docs/performance.md of the
template)."""

MAX_TIMES_BACK = 3
"""How often a model may be sent from the event loop to its thread before it stays there."""


class Pace:
    """Whether batches are quick enough, on average, to be run on the event loop.

    A model can be quick with its example and slow with what callers send. So it is not taken for
    quick before `MEMORY_RUNS` real batches were, and a long run counts for as many as it held up.
    """

    def __init__(self) -> None:
        self._mean = INLINE_BELOW_S * math.e
        self.row_s = INLINE_BELOW_S
        """What batches that worked took lately for each of their rows, waits included."""

        self._batches = 0
        """That `row_s` is of, `MEMORY_RUNS` at the most."""

    @property
    def is_quick(self) -> bool:
        return self._mean < INLINE_BELOW_S

    def ran(self, seconds: float) -> None:
        self._mean += (seconds - self._mean) / MEMORY_RUNS

    def took(self, seconds: float, rows: int) -> None:
        self._batches = min(self._batches + 1, MEMORY_RUNS)
        self.row_s += (seconds / rows - self.row_s) / self._batches


@dataclass(slots=True)
class Run:
    """How a call of `predict` on a thread went."""

    outcomes: Sequence[Outcome]
    seconds: float
    """Without waits for the interpreter's lock."""

    elapsed: float
    """With all waits."""


class Instance:
    """One loaded predictor and its thread; a pipelined one prepares on a second thread."""

    def __init__(self, name: str) -> None:
        self.running = 0
        self._thread = _executor(name)
        self._prepare_thread = _executor(f"{name}-prep")
        self._predictor: Predictor | None = None

    @property
    def predictor(self) -> Predictor:
        assert self._predictor, "not loaded"  # noqa: S101
        return self._predictor

    async def load(self, load: Callable[[], Predictor]) -> None:
        self._predictor = await asyncio.wrap_future(self._thread.submit(load))

    def submit(self, rows: Rows) -> Future[Run]:
        predictor = self.predictor
        if not isinstance(predictor, PipelinedPredictor):
            return self._submit(partial(run, predictor, rows))
        prepared = self._prepare_thread.submit(copy_context().run, predictor.prepare, rows)
        # It waits for no batch but its own, as both threads take them in the same order.
        compute = partial(_checked, predictor, rows, lambda: predictor.compute(prepared.result()))
        return self._submit(compute)

    def _submit(self, predict: Callable[[], Sequence[Outcome]]) -> Future[Run]:
        # On the thread, too, it is known on whose behalf this is done.
        return self._thread.submit(copy_context().run, _timed, predict)

    def close(self) -> None:
        for thread in (self._prepare_thread, self._thread):
            thread.shutdown(wait=False, cancel_futures=True)


def _executor(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    """Let the event loop go first. The threads that this one starts do so, too."""
    # Elsewhere than on Linux it would be all of the process that gives way.
    if sys.platform == "linux":
        # A sandbox may forbid it.
        with suppress(OSError):
            os.nice(NICER_THAN_LOOP)


class Runner:
    """Runs batches on the instances of one model.

    `on_lost` is called when the device has failed for good, before the batch's future is done.
    """

    def __init__(
        self, name: str, predictor_class: type[Predictor], on_lost: Callable[[], None]
    ) -> None:
        self._on_lost = on_lost
        self._instances = [
            Instance(f"model-{name}-{number}") for number in range(predictor_class.instances)
        ]
        is_pipelined = issubclass(predictor_class, PipelinedPredictor)
        self.slots = len(self._instances) * (2 if is_pipelined else 1)
        """Batches that may be under way: of each instance one, and one more in preparation."""

        self.pace = Pace()
        self.may_run_inline = False
        self._is_always_inline = predictor_class.runs_inline is True
        self._times_back = 0
        self.last_success = float("-inf")
        """When a batch last worked, by `monotonic`."""

    @property
    def predictor(self) -> Predictor:
        """One of the instances."""
        return self._instances[0].predictor

    async def load(self, load: Callable[[], Predictor]) -> None:
        """Call `load` on the thread of each instance, one after the other."""
        self._loop = asyncio.get_running_loop()
        for instance in self._instances:
            await instance.load(load)

    async def measure(self, rows: Rows) -> float:
        """Run `rows` three times, and give the seconds that the quickest run took, waits included:
        there are none for the interpreter's lock, as nobody asks for anything yet."""
        runs = [await asyncio.wrap_future(self._instances[0].submit(rows)) for _ in range(3)]
        return min(run.elapsed for run in runs)

    def run(self, rows: Rows) -> asyncio.Future[Sequence[Outcome]]:
        """Of as many outcomes as `rows`, or of PredictionFailed. Done already if run inline."""
        loop = self._loop
        answer: asyncio.Future[Sequence[Outcome]] = loop.create_future()
        instance = self._instances[0]
        if len(self._instances) > 1:
            instance = min(self._instances, key=lambda instance: instance.running)
        is_quick = self.may_run_inline and self.pace.is_quick
        if (is_quick or self._is_always_inline) and not instance.running:
            self._run_inline(instance.predictor, rows, answer)
        else:
            running = instance.submit(rows)
            instance.running += 1
            running.add_done_callback(partial(_tell, loop, partial(self._ran, instance, answer)))
        try:
            return answer
        finally:
            # An error of it knows this frame as well, by the one that it was raised in.
            del answer

    def _run_inline(
        self, predictor: Predictor, rows: Rows, answer: asyncio.Future[Sequence[Outcome]]
    ) -> None:
        started = perf_counter()
        try:
            answer.set_result(run(predictor, rows))
            self.pace.took(perf_counter() - started, len(rows))
            self.last_success = monotonic()
        except PredictionFailed as error:
            self._fail(answer, error)
            # The error knows this frame, which is not to know the error.
            del answer
        self._note_pace(perf_counter() - started)

    def _note_pace(self, seconds: float) -> None:
        was_quick = self.pace.is_quick
        self.pace.ran(seconds)
        if was_quick == self.pace.is_quick or not self.may_run_inline or self._is_always_inline:
            return
        if was_quick:
            self._times_back += 1
            self.may_run_inline = self._times_back < MAX_TIMES_BACK
            log.warning(
                "a batch held up the event loop for %.0f ms; the model goes back to its thread%s",
                seconds * 1000,
                "" if self.may_run_inline else " for good",
            )
        else:
            log.info("batches are quick; the model runs on the event loop from now on")

    def _fail(self, answer: asyncio.Future[Sequence[Outcome]], error: BaseException) -> None:
        if isinstance(error, ModelLost):
            self._on_lost()
        answer.set_exception(error)

    def _ran(
        self,
        instance: Instance,
        answer: asyncio.Future[Sequence[Outcome]],
        running: Future[Run],
    ) -> None:
        instance.running -= 1
        if answer.done():
            return
        if running.cancelled():
            answer.cancel()
        elif error := running.exception():
            self._fail(answer, error)
        else:
            ran = running.result()
            self._note_pace(ran.seconds)
            self.pace.took(ran.elapsed, len(ran.outcomes))
            self.last_success = monotonic()
            answer.set_result(ran.outcomes)

    def close(self) -> None:
        """What waits for a thread is given up; a batch that runs cannot be stopped."""
        for instance in self._instances:
            instance.close()


def _tell(
    loop: asyncio.AbstractEventLoop, ran: Callable[[Future[Run]], None], running: Future[Run]
) -> None:
    """Called by the thread. `asyncio.wrap_future` would take another turn of the loop."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(ran, running)


def run(predictor: Predictor, rows: Rows) -> Sequence[Outcome]:
    """Call `predictor` and check that it gave one outcome for each row.

    Raises:
        PredictionFailed: it did not, or it raised, which is the cause then.
    """
    return _checked(predictor, rows, lambda: predictor.predict(rows))


def _checked(
    predictor: Predictor, rows: Rows, predict: Callable[[], Sequence[Outcome]]
) -> Sequence[Outcome]:
    try:
        outcomes = predict()
    except BaseException as error:
        # All of them: a future takes no StopIteration, and a SystemExit would end the thread.
        raise failure(error, predictor.provider) from error
    try:
        return _as_list(predictor, rows, outcomes)
    except PredictionFailed:
        raise
    except BaseException as error:
        # A sequence of the predictor's own can raise anything, too.
        raise failure(error, predictor.provider) from error


def _as_list(predictor: Predictor, rows: Rows, outcomes: Any) -> list[Outcome]:
    """
    Raises:
        PredictionFailed: they are not one for each of `rows`, or no predictions.
    """
    if not isinstance(outcomes, Sequence):
        raise PredictionFailed(f"The model gave a {type(outcomes).__name__}, not a list.")
    if len(outcomes) != len(rows):
        raise PredictionFailed(f"The model gave {len(outcomes)} predictions for {len(rows)} rows.")
    for outcome in outcomes:
        if not isinstance(outcome, (predictor.prediction, ItemError)):
            raise PredictionFailed(f"The model gave a {type(outcome).__name__} as a prediction.")
    # Not every sequence can be sliced.
    return outcomes if type(outcomes) is list else list(outcomes)


def _timed(predict: Callable[[], Sequence[Outcome]]) -> Run:
    computed, started = thread_time(), perf_counter()
    outcomes = predict()
    elapsed = perf_counter() - started
    seconds = elapsed if elapsed > LOCK_WAIT_S else thread_time() - computed
    return Run(outcomes, seconds, elapsed)
