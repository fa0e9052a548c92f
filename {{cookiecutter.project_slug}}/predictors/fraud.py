"""Payment fraud: an ONNX model. This is the file to edit: make it yours.

The service finds it by its name, checks requests against `Features`, and calls `predict`.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from app.onnx import open_session, provider_of
from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device

FRAUD_THRESHOLD = 0.5


class Features(BaseFeatures):
    """What a caller sends: one payment."""

    transaction_amount: float = Field(gt=0, lt=1_000_000, description="In the account's currency")
    merchant_category: Literal["electronics", "grocery", "restaurant", "travel", "other"]
    user_account_age_days: int = Field(ge=0, le=36_500)
    hour_of_day: int = Field(ge=0, le=23, description="Local time of the payment")


class Prediction(BasePrediction):
    """What the caller gets back."""

    fraud_probability: float = Field(ge=0, le=1)
    is_fraud: bool
    confidence: float = Field(ge=0.5, le=1, description="Probability of the answer in is_fraud")


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(
        transaction_amount=1250.0,
        merchant_category="electronics",
        user_account_age_days=12,
        hour_of_day=3,
    )

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.session = open_session(artifact_dir / "model.onnx", device)
        self.provider = provider_of(self.session)

    def predict(self, batch: list[Features]) -> list[Prediction]:
        # One column for each input of the graph, each of shape (rows, 1).
        inputs = {
            "transaction_amount": [[row.transaction_amount] for row in batch],
            "merchant_category": [[row.merchant_category] for row in batch],
            "user_account_age_days": [[row.user_account_age_days] for row in batch],
            "hour_of_day": [[row.hour_of_day] for row in batch],
        }
        columns = {
            name: np.array(values, dtype=object if name == "merchant_category" else np.float32)
            for name, values in inputs.items()
        }
        [probabilities] = self.session.run(["probabilities"], columns)
        return [
            Prediction(
                fraud_probability=fraud,
                is_fraud=fraud >= FRAUD_THRESHOLD,
                confidence=max(fraud, 1 - fraud),
            )
            for fraud in probabilities[:, 1].tolist()
        ]
