"""How many CPUs a model may compute on."""

import os
from pathlib import Path

import pytest

from app import cpus
from tests.service.server import Start, publish

PREDICTOR = """
import os
from pathlib import Path

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    x: float = 0


class Prediction(BasePrediction):
    threads: str


class Predictor(BasePredictor[Features, Prediction]):
    example = Features()

    def load(self, artifact_dir: Path, device: Device) -> None:
        pass

    def predict(self, batch: list[Features]) -> list[Prediction]:
        return [Prediction(threads=os.environ["OMP_NUM_THREADS"]) for _ in batch]
"""


@pytest.mark.parametrize(
    ("content", "expected"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", os.cpu_count()), ("", None)],
)
def test_a_quota_of_the_cgroup_counts(tmp_path: Path, content: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    quota = cpus.cgroup_quota(tmp_path / "cpu.max")
    assert quota == (expected or os.cpu_count())
    assert cpus.cgroup_quota(tmp_path / "nothing") == os.cpu_count()


@pytest.mark.parametrize("given", [None, "7"])
def test_what_computes_with_openmp_is_told(start: Start, tmp_path: Path, given: str | None) -> None:
    (tmp_path / "threads.py").write_text(PREDICTOR)
    publish(tmp_path / "artifacts", "threads", none_txt=b"none")
    settings = {"PREDICTORS_DIR": str(tmp_path), "ARTIFACTS_DIR": str(tmp_path / "artifacts")}
    settings |= {"DEFAULT_MODEL": "threads"} | ({"OMP_NUM_THREADS": given} if given else {})
    service = start(**settings).wait_for("/ready")
    answer = service.client.post("/v1/predict", json={"features": {}})
    assert answer.json()["prediction"] == {"threads": given or str(cpus.usable_cpus())}
