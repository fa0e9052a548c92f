"""The model repository: loads and warms the models, and holds the version that answers."""

import asyncio
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Any

from app import artifacts
from app.artifacts import Artifact
from app.batching import Collector, Limits
from app.discovery import PredictorClass, discover
from app.errors import (
    ModelNotFound,
    NotReady,
    PredictionFailed,
    StartupError,
    on_one_line,
)
from app.predictor import BaseFeatures, BasePrediction, BasePredictor, ItemError, Provider
from app.settings import Settings
from app.waiting import FixedWindow, LearnedReturns

log = logging.getLogger(__name__)

Outcome = BasePrediction | ItemError


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class ServedModel:
    """A predictor with the artifact version that answers for it, and the thread it runs on.

    One thread, as predictors are not asked to be thread-safe.
    """

    def __init__(self, name: str, predictor_class: PredictorClass, settings: Settings) -> None:
        self.name = name
        self.predictor_class = predictor_class
        self.state = State.LOADING
        self.artifact: Artifact | None = None
        self.last_success = float("-inf")
        """When a prediction last worked, in seconds on the event loop's clock."""

        self._settings = settings
        self._predictor: BasePredictor[Any, Any] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model-{name}")
        self._collector: Collector[BaseFeatures, Outcome] | None = None

    @property
    def version(self) -> str | None:
        return self.artifact.version if self.artifact else None

    @property
    def provider(self) -> Provider | None:
        return self._predictor.provider if self._predictor else None

    async def load(self) -> None:
        """Check the newest version's files, load it, and run it once on the example.

        Raises:
            StartupError: with the model, the file and the remedy.
        """
        started = perf_counter()
        try:
            loading = self._thread.submit(self._load_newest)
            artifact, predictor = await asyncio.wrap_future(loading)
        except Exception:
            self.state = State.FAILED
            raise
        self.artifact, self._predictor = artifact, predictor
        self._collector = self._collect_for(predictor)
        self.state = State.READY
        log.info(
            "model ready",
            extra={
                "model": self.name,
                "model_version": self.version,
                "provider": self.provider,
                "load_s": round(perf_counter() - started, 3),
            },
        )

    def _load_newest(self) -> tuple[Artifact, BasePredictor[Any, Any]]:
        try:
            artifact = artifacts.newest(self._settings.artifacts_dir, self.name)
            artifact.verify()
        except OSError as error:
            raise StartupError(
                f"{self.name}: {error.filename} cannot be read ({error.strerror}); "
                "let the service's user read it"
            ) from error
        files = ", ".join(str(artifact.directory / name) for name in artifact.manifest.files)
        source = Path(sys.modules[self.predictor_class.__module__].__file__ or "")
        remedy = "train it again or mend the predictor (LOG_LEVEL=debug shows the traceback)"
        try:
            predictor = self.predictor_class()
            predictor.load(artifact.directory, self._settings.device)
        except StartupError as error:
            raise StartupError(f"{self.name}: {error}") from None
        except Exception as error:
            log.debug("%s: load failed", self.name, exc_info=True)
            raise StartupError(
                f"{self.name}: cannot load {files}: {on_one_line(error, source)}; {remedy}"
            ) from error
        if self._settings.device == "cuda" and predictor.provider != "cuda":
            raise StartupError(
                f"{self.name}: DEVICE=cuda, but this model runs on the CPU; set DEVICE=auto, "
                'or have load() use the GPU and set self.provider = "cuda"'
            )
        try:
            outcome = run(predictor, [self.predictor_class.example])[0]
            if isinstance(outcome, ItemError):
                raise PredictionFailed(outcome.reason)
        except Exception as error:
            log.debug("%s: warm-up failed", self.name, exc_info=True)
            raise StartupError(
                f"{self.name}: {files} does not fit {source.name}: predict([example]) failed: "
                f"{on_one_line(error.__cause__ or error, source)}; {remedy}"
            ) from error
        self._warn_of_schema_change(artifact)
        return artifact, predictor

    def _warn_of_schema_change(self, artifact: Artifact) -> None:
        schema = self.predictor_class.features.model_json_schema()
        trained = set(artifact.manifest.input_schema.get("properties", {}))
        served = set(schema.get("properties", {}))
        if trained and trained != served:
            log.warning(
                "%s: the fields of Features have changed since version %s was published: %s",
                self.name,
                artifact.version,
                ", ".join(sorted(trained ^ served)),
            )

    async def predict(self, rows: Sequence[BaseFeatures], deadline: float) -> list[Outcome]:
        """The outcomes of `rows`, in order; they may share a batch with those of other callers.

        Raises:
            ServiceError: the model is not loaded, overloaded, late, or failed.
        """
        if self._collector is None:
            raise NotReady(f"Model {self.name} is {self.state}.")
        return await self._collector.submit(rows, deadline)

    def _collect_for(self, predictor: BasePredictor[Any, Any]) -> Collector[BaseFeatures, Outcome]:
        async def run_batch(rows: list[BaseFeatures]) -> Sequence[Outcome]:
            outcomes = await asyncio.wrap_future(self._thread.submit(run, predictor, rows))
            self.last_success = asyncio.get_running_loop().time()
            return outcomes

        settings = self._settings
        max_rows = predictor.batch_max_rows or settings.batch_max_rows
        max_wait = settings.batch_max_wait_ms / 1000
        is_learned = settings.batch_policy == "learned"
        policy = LearnedReturns(max_rows) if is_learned else FixedWindow(max_wait)
        return Collector(run_batch, Limits(max_rows, settings.queue_max_rows, max_wait), policy)

    def close(self) -> None:
        """Fail what waits. A prediction that runs cannot be stopped."""
        if self._collector:
            self._collector.close()
        self._thread.shutdown(wait=False, cancel_futures=True)


def run(predictor: BasePredictor[Any, Any], rows: list[BaseFeatures]) -> Sequence[Outcome]:
    """Call `predictor` and check that it gave one outcome for each row.

    Raises:
        PredictionFailed: it did not, or it raised, which is the cause then.
    """
    try:
        outcomes = predictor.predict(rows)
    except BaseException as error:
        # All of them: a future takes no StopIteration, and a SystemExit would end the thread.
        raise PredictionFailed("The model failed on this request.") from error
    if not isinstance(outcomes, Sequence):
        raise PredictionFailed(f"The model gave a {type(outcomes).__name__}, not a list.")
    if len(outcomes) != len(rows):
        raise PredictionFailed(f"The model gave {len(outcomes)} predictions for {len(rows)} rows.")
    for outcome in outcomes:
        if not isinstance(outcome, (predictor.prediction, ItemError)):
            raise PredictionFailed(f"The model gave a {type(outcome).__name__} as a prediction.")
    return outcomes


class ModelRepository:
    """All models of the service, by name."""

    def __init__(self, settings: Settings) -> None:
        self._artifacts_dir = settings.artifacts_dir
        self.models = {
            name: ServedModel(name, predictor_class, settings)
            for name, predictor_class in discover(settings.predictors_dir).items()
        }
        self.default = self._choose_default(settings)

    def _choose_default(self, settings: Settings) -> str:
        name, names = settings.default_model, ", ".join(self.models)
        if name is None and len(self.models) == 1:
            return names
        if name is None:
            raise StartupError(f"Set DEFAULT_MODEL to the model behind /v1/predict, of: {names}")
        if name not in self.models:
            path = settings.predictors_dir / f"{name}.py"
            raise StartupError(f"DEFAULT_MODEL={name}: there is no {path}; choose of: {names}")
        return name

    def get(self, name: str) -> ServedModel:
        """
        Raises:
            ModelNotFound: there is no such model; the message says which there are.
        """
        try:
            return self.models[name]
        except KeyError:
            raise ModelNotFound(f"No such model. Models: {', '.join(self.models)}.") from None

    def versions(self, name: str) -> list[str]:
        """The versions of a model that lie on disk, oldest first."""
        return artifacts.versions(self._artifacts_dir, name)

    async def load(self) -> None:
        """Load all models at the same time; the first failure is raised at once."""
        await asyncio.gather(*(model.load() for model in self.models.values()))

    def close(self) -> None:
        for model in self.models.values():
            model.close()
