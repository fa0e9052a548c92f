"""The forest of w2, except that it raises where f0 is `POISON` or `HUGE`."""

from pathlib import Path
from typing import Any

import joblib
import numpy as np

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device

POISON = 666.0
HUGE = 777.0
"""Too large for any memory."""


class Features(BaseFeatures):
    f0: float
    f1: float
    f2: float
    f3: float
    f4: float
    f5: float
    f6: float
    f7: float


class Prediction(BasePrediction):
    score: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(f0=0.1, f1=-0.2, f2=0.3, f3=-0.4, f4=0.5, f5=-0.6, f6=0.7, f7=-0.8)

    def load(self, artifact_dir: Path, device: Device) -> None:  # noqa: ARG002
        self.forest: Any = joblib.load(artifact_dir / "model.joblib")

    def predict(self, batch: list[Features]) -> list[Prediction]:
        if any(row.f0 == POISON for row in batch):
            raise ArithmeticError("poison")
        if any(row.f0 == HUGE for row in batch):
            raise MemoryError
        rows = np.array(
            [[row.f0, row.f1, row.f2, row.f3, row.f4, row.f5, row.f6, row.f7] for row in batch]
        )
        return [Prediction(score=score) for score in self.forest.predict_proba(rows)[:, 1].tolist()]
