"""What batches take, measured on the predictor itself, without a service around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from time import perf_counter

from app import artifacts
from app.discovery import PredictorClass
from app.errors import PredictionFailed, StartupError
from app.predictor import BaseFeatures
from app.runner import Predictor, run
from app.settings import Settings

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEASURE_S = 0.05
"""For how long a size is repeated, and at least `MIN_RUNS` times."""

MIN_RUNS = 3


@dataclass(frozen=True)
class Batch:
    rows: int
    ms: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.ms * 1000


def load(name: str, predictor_class: PredictorClass, settings: Settings) -> Predictor:
    """The newest version of a model, loaded as the service loads it.

    Raises:
        StartupError: it cannot be.
    """
    try:
        artifact = artifacts.newest(settings.artifacts_dir, name)
        artifact.verify()
        predictor = predictor_class()
        predictor.load(artifact.directory, settings.device)
        run(predictor, [predictor.example])
    except (StartupError, PredictionFailed) as error:
        raise StartupError(str(error)) from error
    # A predictor may raise anything.
    except Exception as error:
        raise StartupError(f"{name}: cannot be loaded: {error!r}") from error
    return predictor


def measure(predictor: Predictor, rows: Sequence[BaseFeatures], enough_ms: float) -> list[Batch]:
    """The median time of batches of `rows`, by size, until one takes longer than `enough_ms` and
    than twice as long as a single row.

    Raises:
        PredictionFailed: the model raised, or broke its contract.
    """
    found: list[Batch] = []
    source = cycle(rows)
    for size in predictor.allowed_batch_sizes or SIZES:
        times: list[float] = []
        while len(times) <= MIN_RUNS or sum(times) < MEASURE_S:
            batch = list(islice(source, size))
            started = perf_counter()
            run(predictor, batch)
            times.append(perf_counter() - started)
        # The first of a size may compile, or allocate.
        found.append(Batch(size, median(times[1:]) * 1000))
        if found[-1].ms > max(enough_ms, 2 * found[0].ms):
            break
    return found
