"""Trains the sample fraud model and publishes it as the next version.

    python -m training.fraud

The payments are synthetic, made by `make_payments` with a fixed seed; replace it by your data.
Pre-processing is part of the exported graph, so the service needs nothing else that was fitted.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pandas as pd
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder

from app.artifacts import new_version
from app.reference import describe
from app.settings import load_settings
from predictors.fraud import Features, Predictor

MODEL = Path(__file__).stem
SEED = 20_261_122
CATEGORIES = ["electronics", "grocery", "restaurant", "travel", "other"]
NUMBERS = ["transaction_amount", "user_account_age_days", "hour_of_day"]

TOLERANCE = 1e-5
"""Largest difference of a probability between scikit-learn and the exported graph."""


def make_payments(rows: int) -> tuple[pd.DataFrame, pd.Series]:
    """Payments and whether each is fraud.

    Amounts are log-normal with a median of 50. The odds of fraud grow with the amount, for
    electronics and travel, at night (0 to 5), and for accounts younger than a month or so.
    About 6% of the payments are fraud.
    """
    random = np.random.default_rng(SEED)
    payments = pd.DataFrame(
        {
            "transaction_amount": np.clip(random.lognormal(np.log(50), 1.2, rows), 0.01, 999_999),
            "merchant_category": random.choice(CATEGORIES, rows, p=[0.15, 0.35, 0.25, 0.1, 0.15]),
            "user_account_age_days": np.minimum(random.exponential(700, rows), 36_500).astype(int),
            "hour_of_day": random.integers(0, 24, rows),
        }
    )
    log_odds = (
        -6.0
        + 0.9 * np.log(payments["transaction_amount"] / 50)
        + 1.3 * payments["merchant_category"].isin(["electronics", "travel"])
        + 1.8 * (payments["hour_of_day"] < 6)
        + 2.5 * np.exp(-payments["user_account_age_days"] / 30)
    )
    is_fraud = pd.Series(random.random(rows) < 1 / (1 + np.exp(-log_odds)))
    # The service computes in float32; training on the same numbers keeps the two in step.
    payments[NUMBERS] = payments[NUMBERS].astype(np.float32)
    return payments, is_fraud


def train(payments: pd.DataFrame, is_fraud: pd.Series) -> Pipeline:
    columns = ColumnTransformer(
        [
            ("category", OneHotEncoder(categories=[CATEGORIES]), ["merchant_category"]),
            ("numbers", "passthrough", NUMBERS),
        ]
    )
    classifier = GradientBoostingClassifier(n_estimators=80, max_depth=3, random_state=SEED)
    return Pipeline([("columns", columns), ("classifier", classifier)]).fit(payments, is_fraud)


def export(pipeline: Pipeline) -> bytes:
    """The pipeline as an ONNX graph with an input of shape (rows, 1) for each feature."""
    inputs = [
        (name, StringTensorType([None, 1]) if name not in NUMBERS else FloatTensorType([None, 1]))
        for name in Features.model_fields
    ]
    options = {id(pipeline): {"zipmap": False}}
    model = to_onnx(pipeline, initial_types=inputs, options=options)
    # skl2onnx lists them in the order of a set, which differs from one process to the next.
    model.opset_import.sort(key=lambda opset: opset.domain)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def largest_difference(pipeline: Pipeline, model: bytes, payments: pd.DataFrame) -> float:
    """Between the probabilities of `pipeline` and those of the exported `model`."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = {name: payments[[name]].to_numpy() for name in payments}
    [exported] = session.run(["probabilities"], inputs)
    return float(np.abs(pipeline.predict_proba(payments) - exported).max())


def main() -> None:
    payments, is_fraud = make_payments(20_000)
    train_x, test_x, train_y, test_y = train_test_split(
        payments, is_fraud, test_size=0.25, random_state=SEED
    )
    pipeline = train(train_x, train_y)
    model = export(pipeline)

    difference = largest_difference(pipeline, model, test_x)
    if difference > TOLERANCE:
        raise SystemExit(f"The ONNX graph differs from scikit-learn by {difference:.2g}.")
    roc_auc = float(roc_auc_score(test_y, pipeline.predict_proba(test_x)[:, 1]))

    with new_version(
        load_settings().artifacts_dir,
        MODEL,
        input_schema=Features.model_json_schema(),
        trained_with=["scikit-learn", "skl2onnx", "onnx"],
        metrics={"roc_auc": round(roc_auc, 4)},
    ) as directory:
        (directory / "model.onnx").write_bytes(model)
        # What the service will be measured against, to see when payments are no longer like these.
        rows = test_x.to_dict("records")
        sample = [Features.model_validate(row, strict=False) for row in rows]
        # The hour goes through all of its values by itself.
        describe(directory, Predictor, sample, leave_out=["hour_of_day"])
    print(f"{MODEL}: ROC AUC {roc_auc:.3f}; the ONNX graph agrees within {difference:.1e}.")


if __name__ == "__main__":
    main()
