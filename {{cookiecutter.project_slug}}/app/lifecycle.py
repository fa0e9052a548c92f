"""Starting, ready, draining: what the service is doing, and what the probes read."""

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum

from app.errors import ServiceError, StartupError
from app.predictor import ItemError
from app.repository import ModelRepository, ServedModel
from app.settings import Settings

log = logging.getLogger(__name__)

TEST_WAIT_S = 0.5
"""How long /ready waits for a test prediction: kubelet's default is to give up after 1 s."""


class Phase(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass
class ReadinessTest:
    """The last test prediction of a model, and the one under way."""

    fault: str | None = None
    finished: float = float("-inf")
    started: float = 0
    task: asyncio.Task[None] | None = None


class Lifecycle:
    """Times are seconds on the event loop's clock."""

    def __init__(self, repository: ModelRepository, settings: Settings) -> None:
        self.phase = Phase.LOADING
        self.repository = repository
        self._settings = settings
        self._loading: asyncio.Task[None] | None = None
        self._tests = {name: ReadinessTest() for name in repository.models}

    def start(self) -> None:
        """Begin to load the models, while the probes already answer."""
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self.repository.load()
        except StartupError as error:
            self._fail(str(error))
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            self._fail(f"Loading failed: {error!r}")
        else:
            if self.phase is Phase.LOADING:
                self.phase = Phase.READY

    def _fail(self, reason: str) -> None:
        self.phase = Phase.FAILED
        log.critical(reason)

    def drain(self) -> None:
        """Stop being ready; what was accepted is still answered."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    async def stop(self) -> None:
        """End what runs in the background. Called when no request is left."""
        tasks = [self._loading, *(test.task for test in self._tests.values())]
        for task in tasks:
            if task:
                task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        self.repository.close()
        log.info("stopped")

    async def readiness_fault(self) -> str | None:
        """Why no traffic should come here; None if it should."""
        if self.phase is not Phase.READY:
            return f"The service is {self.phase}."
        for model in self.repository.models.values():
            if fault := await self._test(model):
                return f"Model {model.name}: {fault}"
        return None

    async def _test(self, model: ServedModel) -> str | None:
        """Run the model on its example, unless the last answer is recent enough to believe.

        A prediction for a caller that worked is as good as a test. While a test waits behind
        real work, the last verdict holds; only a model that gets nothing done within the
        request time-out, when every caller sees 504, is not ready.
        """
        test = self._tests[model.name]
        now = asyncio.get_running_loop().time()
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
            outcome = (await model.predict([model.predictor_class.example]))[0]
            test.fault = outcome.reason if isinstance(outcome, ItemError) else None
        except ServiceError as error:
            test.fault = error.detail
        finally:
            test.finished = asyncio.get_running_loop().time()
            test.task = None
