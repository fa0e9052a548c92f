"""Attention over 4 to 128 tokens in ONNX. A batch is padded to its longest row."""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from app.onnx import open_session, provider_of
from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device

TOKENS = 1000
Token = Annotated[int, Field(ge=0, lt=TOKENS)]


class Features(BaseFeatures):
    tokens: list[Token] = Field(min_length=4, max_length=128)


class Prediction(BasePrediction):
    score: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(tokens=[1, 2, 3, 4, 5, 6])

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.session = open_session(artifact_dir / "model.onnx", device, threads=1)
        self.provider = provider_of(self.session)

    def predict(self, batch: list[Features]) -> list[Prediction]:
        shape = len(batch), max(len(row.tokens) for row in batch)
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for number, row in enumerate(batch):
            tokens[number, : len(row.tokens)] = row.tokens
            mask[number, : len(row.tokens)] = 1
        [scores] = self.session.run(["score"], {"tokens": tokens, "mask": mask})
        return [Prediction(score=score) for score in scores[:, 0].tolist()]
