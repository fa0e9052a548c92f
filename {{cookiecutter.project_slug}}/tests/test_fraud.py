"""The fraud model, over HTTP: the same answers as the model itself, and refusal of bad input."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient

from app import artifacts
from app.settings import Settings
from predictors.fraud import Predictor
from training.fraud import make_payments

MODEL = Path(__file__).stem.removeprefix("test_")
URL = f"/v1/models/{MODEL}/predict"
EXAMPLE: dict[str, Any] = Predictor.example.model_dump(mode="json")


def predict(client: TestClient, **changes: Any) -> dict[str, Any]:
    answer = client.post(URL, json={"features": {**EXAMPLE, **changes}})
    assert answer.status_code == 200, answer.text
    prediction: dict[str, Any] = answer.json()["prediction"]
    return prediction


def test_answers_are_those_of_the_model_called_directly(client: TestClient) -> None:
    payments, _ = make_payments(200)
    version = artifacts.newest(Settings().artifacts_dir, MODEL).directory
    session = ort.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {name: payments[[name]].to_numpy() for name in payments}
    [probabilities] = session.run(["probabilities"], inputs)

    rows = payments.astype({"user_account_age_days": int, "hour_of_day": int})
    answer = client.post(f"{URL}/batch", json={"instances": rows.to_dict(orient="records")})

    predictions = answer.json()["predictions"]
    served = [prediction["fraud_probability"] for prediction in predictions]
    assert served == pytest.approx(probabilities[:, 1].tolist(), abs=1e-6)


def test_a_batch_answers_as_its_rows_alone_do(client: TestClient) -> None:
    amounts = [1.0, 80.0, 400.0, 90_000.0]
    instances = [{**EXAMPLE, "transaction_amount": amount} for amount in amounts]
    batch = client.post(f"{URL}/batch", json={"instances": instances}).json()["predictions"]
    assert batch == [predict(client, transaction_amount=amount) for amount in amounts]


def test_a_risky_payment_scores_higher_than_a_usual_one(client: TestClient) -> None:
    usual = predict(
        client,
        transaction_amount=24.5,
        merchant_category="grocery",
        user_account_age_days=2000,
        hour_of_day=14,
    )
    risky = predict(client)
    assert risky["is_fraud"]
    assert not usual["is_fraud"]
    assert risky["fraud_probability"] > 10 * usual["fraud_probability"]
    assert usual["confidence"] == pytest.approx(1 - usual["fraud_probability"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transaction_amount", 0),
        ("transaction_amount", 1_000_000),
        ("transaction_amount", "12.50"),
        ("transaction_amount", None),
        ("transaction_amount", True),
        ("merchant_category", "casino"),
        ("merchant_category", 3),
        ("user_account_age_days", -1),
        ("user_account_age_days", 36_501),
        ("user_account_age_days", 1.5),
        ("hour_of_day", 24),
        ("hour_of_day", -1),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    client: TestClient, field: str, value: Any
) -> None:
    answer = client.post(URL, json={"features": {**EXAMPLE, field: value}})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [f"features.{field}"]


@pytest.mark.parametrize("value", [0.01, 999_999.99])
def test_the_bounds_of_the_amount_are_accepted(client: TestClient, value: float) -> None:
    assert 0 <= predict(client, transaction_amount=value)["fraud_probability"] <= 1
