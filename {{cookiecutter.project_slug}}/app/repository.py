"""The model repository: loads and warms the models, and holds the version that answers."""

import asyncio
import json
import logging
import resource
import sys
from collections.abc import Callable, Hashable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from app import artifacts
from app.artifacts import Artifact, Stamps
from app.batching import Collector, Limits
from app.cache import ResponseCache, Stores, Times
from app.discovery import SOURCE_SHA256, PredictorClass, discover
from app.drift import ValueCounts
from app.errors import (
    ModelNotFound,
    NotReady,
    PredictionFailed,
    ServiceError,
    StartupError,
    on_one_line,
)
from app.faults import failure
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics, ModelMetrics, StoreMetrics, ValueMetrics
from app.predictor import BaseFeatures, BasePredictor, ItemError, Provider
from app.reference import REFERENCE, Reference
from app.runner import INLINE_BELOW_S, Outcome, Runner, run
from app.settings import Settings
from app.tickets import BatchTracer, Outlet, TimedTicket, Timings
from app.waiting import BatchCost, FixedWindow, LearnedReturns

if TYPE_CHECKING:
    from app.redis_store import RedisStore

log = logging.getLogger(__name__)

TRIVIAL_BELOW_S = 0.0002
"""What a batch takes for each of its rows. The cache takes some 10 us for one among many, and 40
for one that comes alone, when the CPU's caches are cold."""


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    LOST = "lost"
    """It worked until its device failed."""


class ServedModel:
    """A predictor with the artifact version that answers for it."""

    def __init__(
        self,
        name: str,
        predictor_class: PredictorClass,
        settings: Settings,
        stores: Stores,
        tracer: BatchTracer | None = None,
    ) -> None:
        self.name = name
        self.predictor_class = predictor_class
        self.state = State.LOADING
        self.artifact: Artifact | None = None
        self.metrics: ModelMetrics | None = None
        """From when it is loaded."""

        self.cache: ResponseCache | None = None
        """From when it is loaded, if answers may be given again."""

        self.values: ValueCounts | None = None
        """From when it is loaded, if it is known what values to expect."""

        self.on_lost: Callable[[str], None] = log.critical
        """Called when nothing that runs in this process can be expected to work any more."""

        self._settings = settings
        self._stores = stores
        self._tracer = tracer
        self._sample: Outcome | None = None
        """What the model says of its example."""

        self._runner = Runner(name, predictor_class, self._lose)
        self._provider: Provider | None = None
        self._collector: Collector[BaseFeatures, Outcome] | None = None
        self._has_shapes = predictor_class.shape_key is not BasePredictor.shape_key

    @property
    def version(self) -> str | None:
        return self.artifact.version if self.artifact else None

    @property
    def last_success(self) -> float:
        """When a prediction last worked, by `monotonic`."""
        return self._runner.last_success

    @property
    def is_trivial(self) -> bool:
        """Whether rows have lately taken it hardly longer than the cache."""
        return self._runner.pace.row_s < TRIVIAL_BELOW_S

    @property
    def provider(self) -> Provider | None:
        return self._provider

    async def load(self) -> None:
        """Check the newest version's files, load it, and run it on the example.

        Raises:
            StartupError: with the model, the file and the remedy.
        """
        started = perf_counter()
        try:
            artifact, stamps = await asyncio.to_thread(self._verified_artifact)
            await self._runner.load(partial(self._load_predictor, artifact))
            await asyncio.to_thread(self._check_same, artifact, stamps)
            self._collector = await self._make_collector(artifact.version)
        except Exception:
            self.state = State.FAILED
            raise
        self.artifact = artifact
        self.cache = self._make_cache(artifact)
        self.values = self._make_value_counts(artifact)
        self._provider = self._runner.predictor.provider
        self.state = State.READY
        load_s = perf_counter() - started
        if self.metrics:
            device = self._settings.expected_device
            self.metrics.loaded(
                load_s, digest=artifact.digest, device=device, provider=self._provider
            )
        log.info(
            "model ready",
            extra={
                "model": self.name,
                "model_version": self.version,
                "provider": self.provider,
                "load_s": round(load_s, 3),
                "runs_inline": self._runner.may_run_inline,
            },
        )

    async def _make_collector(self, version: str) -> Collector[BaseFeatures, Outcome]:
        predictor, settings = self.predictor_class, self._settings
        sizes = predictor.allowed_batch_sizes
        max_rows = sizes[-1] if sizes else predictor.batch_max_rows or settings.batch_max_rows
        max_wait = settings.batch_max_wait_ms / 1000
        is_learned = settings.batch_policy == "learned"
        cost = await self._measure(max_rows)
        policy = LearnedReturns(max_rows, cost) if is_learned else FixedWindow(max_wait, cost)
        queue_max_rows = self._queue_max_rows()
        limits = Limits(max_rows, queue_max_rows, max_wait, self._runner.slots, sizes)
        for reason in what_prevents_batches(settings, max_rows, queue_max_rows):
            log.warning("%s: %s", self.name, reason)
        self.metrics = ModelMetrics(self.name, version)
        self.metrics.max_rows.set(max_rows)
        collector = Collector(self._runner.run, limits, policy, self.metrics)
        collector.tracer = self._tracer
        return collector

    def _queue_max_rows(self) -> int:
        """
        Raises:
            StartupError: a full request would never fit.
        """
        own, most = self.predictor_class.queue_max_rows, self._settings.max_instances
        if own is not None and own < most:
            raise StartupError(
                f"{self.name}: queue_max_rows = {own} is less than MAX_INSTANCES={most}, so a full "
                "request never fits; raise it, or lower MAX_INSTANCES"
            )
        return own or self._settings.queue_max_rows

    def _make_cache(self, artifact: Artifact) -> ResponseCache | None:
        predictor, settings = self.predictor_class, self._settings
        if not (settings.cache_enabled and predictor.cache):
            return None
        try:
            cache = ResponseCache(
                self._identity(artifact),
                (predictor.features, predictor.prediction),
                self._stores,
                Times(predictor.cache_ttl_s or settings.cache_ttl_s, predictor.cache_lock_s),
                CacheMetrics(self.name, artifact.version),
            )
            cache.check(predictor.example, self._sample)
        # It runs what the predictor's file has defined, and a model serves without it, too.
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("%s: answers are not cached: %s", self.name, why)
            return None
        return cache

    def _make_value_counts(self, artifact: Artifact) -> ValueCounts | None:
        rows_per_s = self._settings.drift_rows_per_s
        if not (rows_per_s and REFERENCE in artifact.manifest.files):
            return None
        path = artifact.directory / REFERENCE
        try:
            reference = Reference.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            log.warning("%s: drift is not watched: %s: %s", self.name, path, type(error).__name__)
            return None
        known = reference.of(self.predictor_class.features, self.predictor_class.prediction)
        metrics = ValueMetrics(self.name, artifact.version, artifact.digest)
        return ValueCounts(known, metrics, rows_per_s)

    def _identity(self, artifact: Artifact) -> tuple[str, ...]:
        """What an answer depends on, beside the row."""
        predictor = self.predictor_class
        source = vars(sys.modules[predictor.__module__])[SOURCE_SHA256]
        schemas = (
            predictor.features.model_json_schema(),
            predictor.prediction.model_json_schema(mode="serialization"),
        )
        return (
            self._settings.service_title,
            self.name,
            artifact.version,
            artifact.digest,
            source,
            *(json.dumps(schema, sort_keys=True) for schema in schemas),
            # What rows are turned into depends on it.
            sys.version,
        )

    async def _measure(self, max_rows: int) -> BatchCost:
        """Learn what batches take, and whether they may run on the event loop."""
        example, runner, cost = self.predictor_class.example, self._runner, BatchCost()
        least = (self.predictor_class.allowed_batch_sizes or (1,))[0]
        cost.ran(least, seconds := await runner.measure([example] * least))
        if seconds < INLINE_BELOW_S:
            try:
                cost.ran(max_rows, seconds := await runner.measure([example] * max_rows))
            except PredictionFailed as error:
                fault = on_one_line(error.__cause__ or error, self._source)
                raise StartupError(
                    f"{self.name}: predict of {max_rows} rows, each the example, failed: {fault}; "
                    "mend the predictor, or set batch_max_rows = 1 in it"
                ) from error
        is_quick = seconds < INLINE_BELOW_S and runner.predictor.provider == "cpu"
        chosen = self.predictor_class.runs_inline
        runner.may_run_inline = is_quick if chosen is None else chosen
        return cost

    def _lose(self) -> None:
        self.state = State.LOST
        if self._collector:
            self._collector.close("The model has to be started again.")
        self.on_lost(f"Model {self.name}: the device failed; this process has to end.")

    def _verified_artifact(self) -> tuple[Artifact, Stamps]:
        try:
            artifact = artifacts.newest(self._settings.artifacts_dir, self.name)
            stamps = artifact.stamps()
            artifact.verify()
        except OSError as error:
            raise StartupError(
                f"{self.name}: {error.filename} cannot be read ({error.strerror}); "
                "let the service's user read it"
            ) from error
        self._warn_of_schema_change(artifact)
        return artifact, stamps

    def _check_same(self, artifact: Artifact, stamps: Stamps) -> None:
        """
        Raises:
            StartupError: what was loaded may not be what was verified, which answers are kept by.
        """
        try:
            is_same = artifact.stamps() == stamps
        except OSError:
            is_same = False
        if not is_same:
            raise StartupError(
                f"{self.name}: the files in {artifact.directory} changed while they were loaded; "
                "publish a new version instead, and start again"
            )

    @property
    def _source(self) -> Path:
        return Path(sys.modules[self.predictor_class.__module__].__file__ or "")

    def _load_predictor(self, artifact: Artifact) -> BasePredictor[Any, Any]:
        files = ", ".join(str(artifact.directory / name) for name in artifact.manifest.files)
        source = self._source
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
            for size in predictor.allowed_batch_sizes or (1,):
                outcome = run(predictor, [predictor.example] * size)[0]
                if isinstance(outcome, ItemError):
                    raise PredictionFailed(outcome.reason)
            self._sample = outcome
        except Exception as error:
            log.debug("%s: warm-up failed", self.name, exc_info=True)
            raise StartupError(
                f"{self.name}: {files} does not fit {source.name}: predict([example]) failed: "
                f"{on_one_line(error.__cause__ or error, source)}; {remedy}"
            ) from error
        return predictor

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

    def admit(self, deadline: float, priority: int) -> None:
        """Whether a request would be taken now, whatever it holds.

        Raises:
            NotReady, Overloaded: it would not.
        """
        if self._collector is None:
            raise NotReady(f"Model {self.name} is {self.state}.")
        self._collector.admit(1, deadline, priority)

    def expected_wait(self) -> float:
        """How long a row that came now would wait, in seconds, at the least."""
        return self._collector.expected_wait() if self._collector else 0.0

    def outlet(self) -> asyncio.Future[Sequence[Outcome]]:
        """To `submit` with, and to wait for.

        Raises:
            NotReady: it is not loaded yet.
        """
        if self._collector is None:
            raise NotReady(f"Model {self.name} is {self.state}.")
        return self._collector.outlet()

    def submit(
        self,
        rows: Sequence[BaseFeatures],
        deadline: float,
        outlet: Outlet[Outcome],
        *,
        priority: int = 0,
        is_alone: bool = False,
    ) -> TimedTicket[Outcome]:
        """Have `rows` scored; they may share a batch with those of other callers.

        Raises:
            NotReady, Overloaded: they were not taken.
            PredictionFailed: the predictor cannot tell the shape of a row.
        """
        collector = self._collector
        if collector is None:
            raise NotReady(f"Model {self.name} is {self.state}.")
        if not self._has_shapes:
            group = (priority, None)
            return collector.enqueue(rows, deadline, outlet, group=group, is_alone=is_alone)
        numbers = self._numbers_by_shape(rows)
        if len(numbers) == 1:
            [shape] = numbers
            return collector.enqueue(rows, deadline, outlet, group=(priority, shape))
        whole = _Whole(outlet, len(rows))
        try:
            for shape, same in numbers.items():
                part, some = _Part(whole, same), [rows[number] for number in same]
                whole.tickets.append(
                    collector.enqueue(some, deadline, part, group=(priority, shape))
                )
        except ServiceError:
            whole.withdraw()
            raise
        return whole

    def _numbers_by_shape(self, rows: Sequence[BaseFeatures]) -> dict[Hashable, list[int]]:
        numbers: dict[Hashable, list[int]] = {}
        try:
            for number, row in enumerate(rows):
                numbers.setdefault(self._runner.predictor.shape_key(row), []).append(number)
        except Exception as error:
            raise failure(error, self._runner.predictor.provider) from error
        return numbers

    def close(self) -> None:
        """Fail what waits. A prediction that runs cannot be stopped."""
        if self._collector:
            self._collector.close()
        self._runner.close()


class _Whole:
    """Rows that are asked for in parts, by their shapes, and answered together or not at all."""

    def __init__(self, outlet: Outlet[Outcome], rows: int) -> None:
        self.outlet = outlet
        self.outcomes: list[Any] = [None] * rows
        self.missing = rows
        self.tickets: list[TimedTicket[Outcome]] = []

    @property
    def timings(self) -> Timings:
        """Of the last part."""
        return self.tickets[-1].timings

    def withdraw(self) -> None:
        for ticket in self.tickets:
            ticket.withdraw()
        self.outlet.cancel()

    def prolong(self, deadline: float) -> None:
        for ticket in self.tickets:
            ticket.prolong(deadline)


class _Part:
    """The outlet of one of the parts."""

    def __init__(self, whole: _Whole, numbers: Sequence[int]) -> None:
        self._whole = whole
        self._numbers = numbers
        self._is_done = False

    def done(self) -> bool:
        # Where one part has failed, nobody waits for the others.
        return self._is_done or self._whole.outlet.done()

    def set_result(self, outcomes: Sequence[Outcome]) -> None:
        self._is_done = True
        whole = self._whole
        for number, outcome in zip(self._numbers, outcomes, strict=True):
            whole.outcomes[number] = outcome
        whole.missing -= len(outcomes)
        if not whole.missing:
            whole.outlet.set_result(whole.outcomes)

    def set_exception(self, error: Exception) -> None:
        self._is_done = True
        self._whole.outlet.set_exception(error)

    def cancel(self) -> None:
        self._is_done = True


def what_prevents_batches(settings: Settings, max_rows: int, queue_max_rows: int) -> list[str]:
    """What keeps batches from ever having `max_rows` rows, and what to do about it."""
    found = []
    if queue_max_rows < max_rows:
        found.append(
            f"a queue of {queue_max_rows} rows is less than a batch of {max_rows}, so batches are "
            "never full; raise QUEUE_MAX_ROWS, or lower BATCH_MAX_ROWS"
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < max_rows:
        found.append(
            f"only {files} files can be open, connections included, which is less than a batch of "
            f"{max_rows} rows; raise the limit (ulimit -n), or lower BATCH_MAX_ROWS"
        )
    max_wait = settings.batch_max_wait_ms / 1000
    if settings.batch_policy == "window" and max_wait >= settings.request_timeout_s:
        found.append(
            f"BATCH_MAX_WAIT_MS={settings.batch_max_wait_ms:g} is not less than "
            "REQUEST_TIMEOUT_S, so who comes alone spends all of it on waiting; lower it"
        )
    return found


class ModelRepository:
    """All models of the service, by name."""

    def __init__(self, settings: Settings, tracer: BatchTracer | None = None) -> None:
        self._artifacts_dir = settings.artifacts_dir
        self._redis = _redis(settings)
        stores = Stores(MemoryStore(settings.cache_max_bytes), self._redis)
        self.models = {
            name: ServedModel(name, predictor_class, settings, stores, tracer)
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

    async def close(self) -> None:
        for model in self.models.values():
            model.close()
        if self._redis:
            await self._redis.close()


def _redis(settings: Settings) -> "RedisStore | None":
    if not (settings.cache_enabled and settings.redis_url):
        return None
    # Its client takes time and memory, and most services do without.
    from app.redis_store import RedisStore  # noqa: PLC0415

    url, timeout_s = settings.redis_url.get_secret_value(), settings.redis_timeout_ms / 1000
    try:
        return RedisStore(url, timeout_s, StoreMetrics())
    # Of which kind depends on the option.
    except Exception as error:
        raise StartupError(f"REDIS_URL: an option behind the ? is wrong: {error}") from None
