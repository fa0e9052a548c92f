"""A model that a test can hold: it predicts when the test opens the named pipe for writing."""

from pathlib import Path

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    pipe: str
    x: float = 0


class Prediction(BasePrediction):
    x: float
    said: str
    number: int
    """How many rows it had seen before this one."""


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(pipe="/dev/null")
    cache = False

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.seen = 0

    def predict(self, batch: list[Features]) -> list[Prediction]:
        first = self.seen
        self.seen += len(batch)
        # Opening a named pipe waits for the other side, here and in the test.
        return [
            Prediction(x=row.x, said=Path(row.pipe).read_text(), number=number)
            for number, row in enumerate(batch, first)
        ]
