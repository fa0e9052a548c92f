"""Where a model runs: on its threads, or on the event loop as long as that is quick."""

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from app.errors import ModelLost, OutOfMemory, PredictionFailed
from app.predictor import (
    BaseFeatures,
    BasePrediction,
    BasePredictor,
    Device,
    PipelinedPredictor,
)
from app.runner import INLINE_BELOW_S, LOCK_WAIT_S, MEMORY_RUNS, NICER_THAN_LOOP, Pace, Runner

QUICK_S = INLINE_BELOW_S / 10


class Features(BaseFeatures):
    x: float = 0


class Prediction(BasePrediction):
    thread: int


class Here(BasePredictor[Features, Prediction]):
    """Says on which thread it runs; does what the test wants of it."""

    example = Features()

    def load(self, artifact_dir: Path, device: Device) -> None:
        pass

    def do(self) -> None:
        pass

    def predict(self, batch: list[Features]) -> list[Prediction]:
        self.do()
        return [Prediction(thread=threading.get_ident()) for _ in batch]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def loaded(
    predictor_class: type[BasePredictor[Any, Any]], lost: Callable[[], None] = lambda: None
) -> Runner:
    runner = Runner("tested", predictor_class, lost)
    await runner.load(predictor_class)
    return runner


def threads(outcomes: Sequence[Any]) -> set[int]:
    return {outcome.thread for outcome in outcomes}


def runs_until_quick(pace: Pace) -> int:
    runs = 0
    while not pace.is_quick:
        pace.ran(QUICK_S)
        runs += 1
    return runs


class TestPace:
    def test_it_takes_a_while_to_be_believed(self) -> None:
        assert MEMORY_RUNS <= runs_until_quick(Pace()) <= 1.2 * MEMORY_RUNS

    def test_a_pause_is_forgiven_and_a_long_run_is_not(self) -> None:
        pace = Pace()
        for _ in range(10 * MEMORY_RUNS):
            pace.ran(QUICK_S)
        pace.ran(0.05)
        assert pace.is_quick
        pace.ran(0.2)
        assert 0 < runs_until_quick(pace) < 2 * MEMORY_RUNS
        pace.ran(20)
        assert runs_until_quick(pace) > 4 * MEMORY_RUNS


class Broken(Sequence[Prediction]):
    """Has a length, and nothing else."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: Any) -> Any:
        raise KeyError


@pytest.mark.parametrize("inline", [False, True])
def test_outcomes_that_cannot_be_read_are_a_failure(inline: bool) -> None:
    class Lazy(Here):
        runs_inline = inline

        def predict(self, batch: list[Features]) -> Any:
            return Broken()

    async def test() -> None:
        runner = await loaded(Lazy)
        with pytest.raises(PredictionFailed):
            await runner.run([Features()])
        runner.close()

    run(test)


class TestWhere:
    def test_a_quick_model_comes_to_the_event_loop_and_leaves_it_after_a_stall(self) -> None:
        async def test() -> None:
            here = threading.get_ident()
            runner = await loaded(Here)
            runner.may_run_inline = True
            for _ in range(MEMORY_RUNS):
                assert threads(await runner.run([Features()])) != {here}
            runs_until_quick(runner.pace)
            answer = runner.run([Features()])
            assert answer.done()
            assert threads(answer.result()) == {here}
            # Waits, as for another service, though it computes nothing.
            runner.predictor.do = lambda: sleep(2 * INLINE_BELOW_S * MEMORY_RUNS)  # type: ignore[attr-defined]
            assert threads(await runner.run([Features()])) == {here}
            assert threads(await runner.run([Features()])) != {here}
            runner.close()

        run(test)

    def test_one_that_computes_for_long_leaves_it_too(self) -> None:
        async def test() -> None:
            runner = await loaded(Here)
            runner.may_run_inline = True
            runs_until_quick(runner.pace)
            # Several times as long as is quick.
            runner.predictor.do = lambda: sum(range(2_000_000))  # type: ignore[attr-defined]
            for _ in range(MEMORY_RUNS):
                await runner.run([Features()])
            assert not runner.pace.is_quick
            runner.close()

        run(test)

    def test_one_that_waits_is_not_measured_as_quick(self) -> None:
        async def test() -> None:
            runner = await loaded(Here)
            runner.predictor.do = lambda: sleep(LOCK_WAIT_S / 2)  # type: ignore[attr-defined]
            assert await runner.measure([Features()]) >= LOCK_WAIT_S / 2
            runner.close()

        run(test)

    @pytest.mark.parametrize("is_inline", [True, False])
    def test_what_it_takes_for_a_row_includes_what_it_waits(self, is_inline: bool) -> None:
        class Waits(Here):
            runs_inline = is_inline

        async def test() -> None:
            runner = await loaded(Waits)
            runner.predictor.do = lambda: sleep(LOCK_WAIT_S / 2)  # type: ignore[attr-defined]
            for _ in range(4 * MEMORY_RUNS):
                await runner.run([Features()] * 2)
            assert runner.pace.row_s > LOCK_WAIT_S / 5
            runner.close()

        run(test)

    def test_one_that_must_not_never_does(self) -> None:
        async def test() -> None:
            runner = await loaded(Here)
            for _ in range(2 * MEMORY_RUNS):
                assert threads(await runner.run([Features()])) != {threading.get_ident()}
            runner.close()

        run(test)

    def test_one_that_must_always_does(self) -> None:
        class Must(Here):
            runs_inline = True

        async def test() -> None:
            runner = await loaded(Must)
            runner.predictor.do = lambda: sleep(2 * INLINE_BELOW_S)  # type: ignore[attr-defined]
            for _ in range(2 * MEMORY_RUNS):
                assert threads(await runner.run([Features()])) == {threading.get_ident()}
            runner.close()

        run(test)

    @pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness there")
    def test_its_thread_lets_the_event_loop_go_first(self) -> None:
        async def test() -> None:
            runner = await loaded(Here)
            niceness = []
            runner.predictor.do = lambda: niceness.append(os.getpriority(os.PRIO_PROCESS, 0))  # type: ignore[attr-defined]
            await runner.run([Features()])
            here = os.getpriority(os.PRIO_PROCESS, 0)
            assert niceness == [min(here + NICER_THAN_LOOP, 19)]
            runner.close()

        run(test)

    def test_instances_run_side_by_side(self) -> None:
        together = threading.Barrier(3)

        class Three(Here):
            instances = 3

            def do(self) -> None:
                # Broken after 20 s, if they came one after the other.
                together.wait(20)

        async def test() -> None:
            runner = await loaded(Three)
            assert runner.slots == 3
            answers = await asyncio.gather(*(runner.run([Features()]) for _ in range(3)))
            assert len(set().union(*map(threads, answers))) == 3
            runner.close()

        run(test)

    def test_a_pipelined_one_prepares_the_next_while_it_computes(self) -> None:
        second_is_prepared = threading.Event()

        class Pipelined(PipelinedPredictor[Features, Prediction]):
            example = Features()
            prepared = 0

            def load(self, artifact_dir: Path, device: Device) -> None:
                pass

            def prepare(self, batch: list[Features]) -> int:
                self.prepared += 1
                if self.prepared == 2:
                    second_is_prepared.set()
                return len(batch)

            def compute(self, prepared: int) -> list[Prediction]:
                assert second_is_prepared.wait(20)
                return [Prediction(thread=threading.get_ident())] * prepared

        async def test() -> None:
            runner = await loaded(Pipelined)
            assert runner.slots == 2
            first, second = runner.run([Features()]), runner.run([Features()] * 2)
            assert len(await first) == 1
            assert len(await second) == 2
            runner.close()

        run(test)


class TestFaults:
    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (ValueError("no"), PredictionFailed),
            (SystemExit(), PredictionFailed),
            (StopIteration(), PredictionFailed),
            (MemoryError(), OutOfMemory),
            (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemory),
            (
                RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for "),
                OutOfMemory,
            ),
            (
                RuntimeError("CUDA error: an illegal memory access was encountered"),
                ModelLost,
            ),
            (RuntimeError("CUDA failure 710: device-side assert triggered"), ModelLost),
            (RuntimeError("a device-side assert of mine"), PredictionFailed),
            # What a caller sends is quoted in errors of these kinds.
            (KeyError("cuda illegal instruction"), PredictionFailed),
            (ValueError("unknown category: out of memory"), PredictionFailed),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("inline", [True, False])
    def test_what_a_model_raises_is_understood(
        self, error: BaseException, kind: type[PredictionFailed], *, inline: bool
    ) -> None:
        async def test() -> None:
            lost: list[bool] = []
            runner = await loaded(Here, lambda: lost.append(True))
            if inline:
                runner.may_run_inline = True
                runs_until_quick(runner.pace)

            def fail() -> None:
                raise error

            runner.predictor.do = fail  # type: ignore[attr-defined]
            runner.predictor.provider = "cuda"
            with pytest.raises(PredictionFailed) as caught:
                await runner.run([Features()])
            assert type(caught.value) is kind
            assert caught.value.__cause__ is error
            assert bool(lost) == (kind is ModelLost)
            runner.close()

        run(test)

    def test_a_model_on_the_cpu_has_no_device_to_lose(self) -> None:
        async def test() -> None:
            runner = await loaded(Here, lambda: pytest.fail("given up for lost"))

            def fail() -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            runner.predictor.do = fail  # type: ignore[attr-defined]
            with pytest.raises(PredictionFailed):
                await runner.run([Features()])
            runner.close()

        run(test)


def test_what_a_failed_run_had_at_hand_goes_with_its_error() -> None:
    class Array:
        pass

    arrays: weakref.WeakSet[Array] = weakref.WeakSet()

    class Fails(Here):
        # A thread may hold it for a moment longer.
        runs_inline = True

        def do(self) -> None:
            array = Array()
            arrays.add(array)
            raise ValueError("full")

    async def test() -> None:
        runner = await loaded(Fails)
        gc.disable()
        try:
            failed = runner.run([Features()])
            assert len(arrays) == 1
            assert failed.exception()
            del failed
            assert not arrays
        finally:
            gc.enable()
            runner.close()

    run(test)
