"""Wine: which of three cultivars, by chemical analysis; a scikit-learn model. Make it yours.

The service finds it by its name, checks requests against `Features`, and calls `predict`.
"""

from operator import attrgetter
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from pydantic import Field

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    """What a caller sends: one analysis. The order of the fields is the model's column order."""

    alcohol: float = Field(gt=0, le=100, description="Percent by volume")
    malic_acid: float = Field(ge=0)
    ash: float = Field(ge=0)
    alcalinity_of_ash: float = Field(ge=0)
    magnesium: float = Field(ge=0)
    total_phenols: float = Field(ge=0)
    flavanoids: float = Field(ge=0)
    nonflavanoid_phenols: float = Field(ge=0)
    proanthocyanins: float = Field(ge=0)
    color_intensity: float = Field(ge=0)
    hue: float = Field(ge=0)
    od280_od315_of_diluted_wines: float = Field(ge=0)
    proline: float = Field(ge=0)


class Prediction(BasePrediction):
    """What the caller gets back."""

    cultivar: int = Field(ge=0, le=2)
    probabilities: list[float] = Field(min_length=3, max_length=3)


columns = attrgetter(*Features.model_fields)
"""All features of a row, in the order of the model's columns."""


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(
        alcohol=14.23,
        malic_acid=1.71,
        ash=2.43,
        alcalinity_of_ash=15.6,
        magnesium=127.0,
        total_phenols=2.8,
        flavanoids=3.06,
        nonflavanoid_phenols=0.28,
        proanthocyanins=2.29,
        color_intensity=5.64,
        hue=1.04,
        od280_od315_of_diluted_wines=3.92,
        proline=1065.0,
    )

    def load(self, artifact_dir: Path, device: Device) -> None:
        # A joblib file is a pickle: opening one runs whatever code is in it. The service has
        # compared its SHA-256 with the manifest, so it is the file that was published; publish
        # only files that you made or trust.
        self.pipeline: Any = joblib.load(artifact_dir / "model.joblib")

    def predict(self, batch: list[Features]) -> list[Prediction]:
        rows = np.array([columns(row) for row in batch])
        probabilities = self.pipeline.predict_proba(rows)
        return [
            Prediction(cultivar=int(np.argmax(row)), probabilities=row.tolist())
            for row in probabilities
        ]
