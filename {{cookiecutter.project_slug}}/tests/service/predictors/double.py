"""A model that works: twice the input."""

from pathlib import Path

from pydantic import Field

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    x: float
    note: str = ""
    # A name that Python does not allow.
    kind: str = Field(default="", alias="class")


class Prediction(BasePrediction):
    y: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features.model_validate({"x": 21, "class": "even"})

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.factor = float((artifact_dir / "factor.txt").read_text())

    def predict(self, batch: list[Features]) -> list[Prediction]:
        return [Prediction(y=self.factor * row.x) for row in batch]
