"""A model that breaks its contract in every way, as asked."""

import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device, ItemError

Fault = Literal[
    "none",
    "raise",
    "stop",
    "exit",
    "short",
    "long",
    "nothing",
    "generator",
    "deque",
    "type",
    "nan",
    "item",
]


class Features(BaseFeatures):
    fault: Fault


class Prediction(BasePrediction):
    y: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(fault="none")

    def load(self, artifact_dir: Path, device: Device) -> None:
        pass

    def predict(self, batch: list[Features]) -> Sequence[Prediction | ItemError]:
        good = [Prediction(y=1) for _ in batch]
        answers: dict[str, Any] = {
            "none": lambda: good,
            "raise": lambda: int("the password is swordfish"),
            "stop": lambda: next(iter([])),
            "exit": sys.exit,
            "short": lambda: good[1:],
            "long": lambda: good * 2,
            "nothing": lambda: None,
            "generator": lambda: (row for row in good),
            "deque": lambda: deque(good),
            "type": lambda: [{"y": 1} for _ in batch],
            "nan": lambda: [Prediction(y=float("nan")) for _ in batch],
            "item": lambda: [
                ItemError("cannot be scored", field="fault") if row.fault == "item" else good[0]
                for row in batch
            ],
        }
        faults = [row.fault for row in batch if row.fault != "none"]
        return cast(Sequence[Prediction], answers[faults[0] if faults else "none"]())
