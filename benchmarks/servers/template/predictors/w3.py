"""A convnet in ONNX on an image of 3x64x64: 12,288 numbers as a flat list, or their raw bytes."""

from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from app.onnx import open_session, provider_of
from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device
from app.tensor import Tensor

SHAPE = (3, 64, 64)
SIZE = 3 * 64 * 64


class Features(BaseFeatures):
    pixels: Annotated[NDArray[np.float32], Tensor(SIZE)]


class Prediction(BasePrediction):
    score: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(pixels=np.full(SIZE, 0.5, np.float32))

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.session = open_session(artifact_dir / "model.onnx", device, threads=1)
        self.provider = provider_of(self.session)

    def predict(self, batch: list[Features]) -> list[Prediction]:
        pixels = np.stack([row.pixels for row in batch]).reshape(-1, *SHAPE)
        [scores] = self.session.run(["score"], {"pixels": pixels})
        return [Prediction(score=score) for score in scores[:, 0].tolist()]
