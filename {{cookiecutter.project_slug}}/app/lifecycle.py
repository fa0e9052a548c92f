"""Starting, ready, draining: what the service is doing, and what the probes read."""

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from time import monotonic
from typing import Protocol

from app.errors import Overloaded, ServiceError, StartupError
from app.predictor import ItemError
from app.repository import ModelRepository, ServedModel
from app.settings import Settings
from app.tickets import outcomes_of

log = logging.getLogger(__name__)

TEST_WAIT_S = 0.5
"""How long /ready waits for a test prediction: kubelet's default is to give up after 1 s."""


class Phase(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    LOST = "lost"
    """The device has failed: what holds the process back is to answer what it has accepted."""


ENDING = (Phase.DRAINING, Phase.LOST)
"""Looked up once, as that takes 0.1 us for each in CPython 3.11."""


@dataclass
class ReadinessTest:
    """The last test prediction of a model, and the one under way."""

    fault: str | None = None
    finished: float = float("-inf")
    started: float = 0
    task: asyncio.Task[None] | None = None


class LoadCount(Protocol):
    """How many workers have loaded their models, which all of them see."""

    @property
    def value(self) -> int: ...

    def add(self, number: int) -> None:
        """The worker with this number has."""


class Lifecycle:
    """Times are seconds of `time.monotonic`."""

    def __init__(self, repository: ModelRepository, settings: Settings) -> None:
        self.phase = Phase.LOADING
        self.repository = repository
        self.is_replacement = False
        """Whether the service was up before this worker began."""

        self._number = 0
        self._workers = 1
        self._load_count: LoadCount | None = None
        self._settings = settings
        self._loading: asyncio.Task[None] | None = None
        self._tests = {name: ReadinessTest() for name in repository.models}
        for model in repository.models.values():
            model.on_lost = self._lose

    def join(self, number: int, workers: int, load_count: LoadCount) -> None:
        """Be the worker `number` of several, all of which answer on one socket.

        No worker says that the service is up before all have loaded, as a request may come to
        any of them; and one that replaces another loads before it answers anything.
        """
        self._number, self._workers = number, workers
        self._load_count = load_count
        self.is_replacement = load_count.value >= workers

    @property
    def is_started(self) -> bool:
        everyone = self._load_count is None or self._load_count.value >= self._workers
        return everyone and self.phase in (Phase.READY, Phase.DRAINING)

    def start(self) -> asyncio.Task[None]:
        """Begin to load the models, while the probes already answer; the task never fails."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return self._loading

    async def _load(self) -> None:
        try:
            await self.repository.load()
        except StartupError as error:
            self._fail(str(error))
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            self._fail(f"Loading failed: {error!r}")
        else:
            if self._load_count:
                self._load_count.add(self._number)
            if self.phase is Phase.LOADING:
                self.phase = Phase.READY

    def _fail(self, reason: str) -> None:
        self.phase = Phase.FAILED
        log.critical(reason)

    def _lose(self, reason: str) -> None:
        self.phase = Phase.LOST
        log.critical(reason)

    @property
    def is_ending(self) -> bool:
        """Whether connections are not to be kept."""
        return self.phase in ENDING

    @property
    def has_failed(self) -> bool:
        """Whether a model could not be loaded."""
        return self.phase is Phase.FAILED

    @property
    def is_broken(self) -> bool:
        """Whether this process has to end by itself."""
        return self.phase in (Phase.FAILED, Phase.LOST)

    def drain(self) -> None:
        """Stop being ready; what was accepted is still answered."""
        if not self.is_broken:
            self.phase = Phase.DRAINING

    async def stop(self) -> None:
        """End what runs in the background. Called when no request is left."""
        tasks = [self._loading, *(test.task for test in self._tests.values())]
        for task in tasks:
            if task:
                task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        await self.repository.close()
        log.info("stopped")

    async def readiness_fault(self) -> str | None:
        """Why no traffic should come here; None if it should."""
        if self.phase is not Phase.READY:
            return f"The service is {self.phase}."
        if not self.is_started:
            return "Other workers are loading."
        models = self.repository.models.values()
        faults = await asyncio.gather(*map(self._test, models))
        for model, fault in zip(models, faults, strict=True):
            if fault:
                return f"Model {model.name}: {fault}"
        return None

    async def _test(self, model: ServedModel) -> str | None:
        """Run the model on its example, unless the last answer is recent enough to believe.

        A prediction for a caller that worked is as good as a test. While a test waits behind
        real work, or finds no room, the last verdict holds; only a model that gets nothing done
        within the request time-out, when every caller sees 504, is not ready.
        """
        test = self._tests[model.name]
        now = monotonic()
        if now - model.last_success < self._settings.ready_cache_s:
            return None
        if now - test.finished < self._settings.ready_cache_s:
            return test.fault
        if test.task is None:
            test.started = now
            test.task = asyncio.create_task(self._run_test(model, test))
        await asyncio.wait({test.task}, timeout=TEST_WAIT_S)
        if test.task and now - test.started > self._settings.request_timeout_s:
            return "a test prediction has not come back."
        return test.fault

    async def _run_test(self, model: ServedModel, test: ReadinessTest) -> None:
        try:
            # It is only given up when the service stops: it is the time it takes that counts.
            deadline = float("inf")
            ask = partial(model.submit, [model.predictor_class.example], deadline)
            [outcome] = await outcomes_of(ask)
            test.fault = outcome.reason if isinstance(outcome, ItemError) else None
        except Overloaded as error:
            if monotonic() - model.last_success > self._settings.request_timeout_s:
                test.fault = error.detail
        except ServiceError as error:
            test.fault = error.detail
        finally:
            test.finished = monotonic()
            test.task = None
