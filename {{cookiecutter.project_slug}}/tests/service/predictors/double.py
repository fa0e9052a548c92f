"""A model that works: twice the input."""

from pathlib import Path

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    x: float
    note: str = ""


class Prediction(BasePrediction):
    y: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(x=21)

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.factor = float((artifact_dir / "factor.txt").read_text())

    def predict(self, batch: list[Features]) -> list[Prediction]:
        return [Prediction(y=self.factor * row.x) for row in batch]
