"""The wine model, over HTTP: the same answers as the model itself, and refusal of bad input."""

from pathlib import Path
from typing import Any

import joblib
import pytest
from fastapi.testclient import TestClient
from sklearn.datasets import load_wine

from app import artifacts
from app.settings import Settings
from predictors.wine import Features, Predictor

MODEL = Path(__file__).stem.removeprefix("test_")
URL = f"/v1/models/{MODEL}/predict"
EXAMPLE: dict[str, Any] = Predictor.example.model_dump(mode="json")


def test_answers_are_those_of_the_model_called_directly(client: TestClient) -> None:
    rows, cultivars = load_wine(return_X_y=True)
    version = artifacts.newest(Settings().artifacts_dir, MODEL).directory
    pipeline = joblib.load(version / "model.joblib")

    instances = [dict(zip(Features.model_fields, row, strict=True)) for row in rows.tolist()]
    predictions = client.post(f"{URL}/batch", json={"instances": instances}).json()["predictions"]

    served = [prediction["probabilities"] for prediction in predictions]
    for row, expected in zip(served, pipeline.predict_proba(rows).tolist(), strict=True):
        assert row == pytest.approx(expected)
    right = sum(
        prediction["cultivar"] == cultivar
        for prediction, cultivar in zip(predictions, cultivars, strict=True)
    )
    assert right / len(rows) > 0.95


def test_the_fields_are_the_columns_of_the_data_set() -> None:
    columns = [name.replace("/", "_") for name in load_wine().feature_names]
    assert list(Features.model_fields) == columns


def test_a_batch_answers_as_its_rows_alone_do(client: TestClient) -> None:
    instances = [{**EXAMPLE, "alcohol": alcohol} for alcohol in (11.0, 12.5, 14.0)]
    batch = client.post(f"{URL}/batch", json={"instances": instances}).json()["predictions"]
    alone = [client.post(URL, json={"features": row}).json()["prediction"] for row in instances]
    assert batch == [
        {**prediction, "probabilities": pytest.approx(prediction["probabilities"])}
        for prediction in alone
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("alcohol", 0), ("alcohol", 101), ("hue", -0.1), ("proline", "1065"), ("ash", None)],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    client: TestClient, field: str, value: Any
) -> None:
    answer = client.post(URL, json={"features": {**EXAMPLE, field: value}})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [f"features.{field}"]
