"""Features that are arrays, over HTTP: as JSON, and as nothing but their bytes."""

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from tests.service.server import Service, assert_problem, publish

pytest.importorskip("numpy")

PREDICTOR = '''"""The sum of each row of a 2 x 3 array."""

from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device
from app.tensor import Tensor


class Features(BaseFeatures):
    values: Annotated[NDArray[np.float32], Tensor(2, 3)]


class Prediction(BasePrediction):
    sums: list[float]


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(values=np.zeros((2, 3), np.float32))

    def load(self, artifact_dir: Path, device: Device) -> None:
        pass

    def predict(self, batch: list[Features]) -> list[Prediction]:
        return [Prediction(sums=row.values.sum(axis=1).tolist()) for row in batch]
'''

VALUES: list[list[float]] = [[1, 2, 3], [4.5, 5, 6]]
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "sums.py").write_text(PREDICTOR, encoding="utf-8")
    publish(folder, "sums", none=b"")
    environment = {
        "PREDICTORS_DIR": str(folder),
        "ARTIFACTS_DIR": str(folder),
        "DEFAULT_MODEL": "sums",
    }
    service = Service(folder / "log", environment)
    try:
        yield service.wait_for("/ready")
    finally:
        service.close()


def raw(values: list[list[float]]) -> bytes:
    import numpy as np  # noqa: PLC0415

    return np.array(values, "<f4").tobytes()


def post_raw(service: Service, body: bytes, path: str = "/v1/predict") -> httpx.Response:
    return service.client.post(path, content=body, headers=RAW)


def test_lists_in_lists_and_bytes_say_the_same(sums: Service) -> None:
    expected = {"sums": [6.0, 15.5]}
    answer = sums.client.post("/v1/predict", json={"features": {"values": VALUES}})
    assert answer.json()["prediction"] == expected
    assert post_raw(sums, raw(VALUES)).json()["prediction"] == expected
    both = [{"values": VALUES}, {"values": VALUES}]
    answer = sums.client.post("/v1/predict/batch", json={"instances": both})
    assert answer.json()["predictions"] == [expected, expected]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ([1, 2, 3, 4.5, 5, 6], "features.values.0"),
        ([[1, 2, 3]], "features.values"),
        ([[1, 2, 3], [4, 5]], "features.values.1"),
        ([[1, 2, 3], [4, "5", 6]], "features.values.1.1"),
        ([[1, 2, 3], [4, None, 6]], "features.values.1.1"),
        ([[1, 2, 3], [4, 1e39, 6]], "features.values"),
        (None, "features.values"),
    ],
)
def test_what_is_wrong_with_lists_is_named(sums: Service, values: Any, field: str) -> None:
    answer = sums.client.post("/v1/predict", json={"features": {"values": values}})
    assert assert_problem(answer, 422)["errors"][0]["field"] == field


def test_what_is_wrong_with_bytes_is_named(sums: Service) -> None:
    problem = assert_problem(post_raw(sums, raw(VALUES)[:-1]), 422)
    [error] = problem["errors"]
    assert error["field"] == "body"
    assert "2 x 3 float32" in error["message"]
    assert "23 bytes" in error["message"]
    assert_problem(post_raw(sums, b""), 422)
    assert_problem(post_raw(sums, raw([[1, 2, 3], [4, float("nan"), 6]])), 422)


def test_bytes_are_for_one_row_and_one_array_only(sums: Service, service: Service) -> None:
    assert_problem(post_raw(sums, raw(VALUES), "/v1/predict/batch"), 415)
    assert_problem(post_raw(service, b"12345678"), 415)
    answer = sums.client.post(
        "/v1/predict", content=raw(VALUES), headers=RAW | {"Content-Encoding": "gzip"}
    )
    assert_problem(answer, 415)


def test_both_forms_are_documented(sums: Service) -> None:
    paths = sums.client.get("/openapi.json").json()["paths"]
    content = paths["/v1/predict"]["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "application/octet-stream"}
    assert "24 bytes" in content["application/octet-stream"]["schema"]["description"]
    batch = paths["/v1/predict/batch"]["post"]["requestBody"]["content"]
    assert batch.keys() == {"application/json"}
