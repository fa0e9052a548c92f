"""What FastAPI's tutorial tells one to write: a pydantic model of the body, and a path function."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from fastapi import FastAPI, Request
from pydantic import BaseModel

MODELS = Path(os.environ["MODELS"])
WORKLOAD = os.environ["WORKLOAD"]
POISON = 666.0
HUGE = 777.0

app = FastAPI()


class Features(BaseModel):
    f0: float
    f1: float
    f2: float
    f3: float
    f4: float
    f5: float
    f6: float
    f7: float


class Image(BaseModel):
    pixels: list[float]


class Text(BaseModel):
    tokens: list[int]


class Prediction(BaseModel):
    score: float


def open_onnx(name: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    path = MODELS / name / "model.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def row_of(features: Features) -> list[float]:
    return list(features.model_dump().values())


@app.get("/")
async def root() -> dict[str, str]:
    return {"message": "Hello World"}


def serve_w1() -> None:
    session = open_onnx("w1")

    @app.post("/predict")
    async def predict(features: Features) -> Prediction:
        rows = np.array([row_of(features)], np.float32)
        answer = session.run(["probabilities"], {"rows": rows})
        return Prediction(score=answer[0][0, 1])


def serve_w2() -> None:
    forest = joblib.load(MODELS / "w2" / "model.joblib")

    @app.post("/predict")
    async def predict(features: Features) -> Prediction:
        return Prediction(score=forest.predict_proba(np.array([row_of(features)]))[0, 1])


def serve_w3() -> None:
    session = open_onnx("w3")

    @app.post("/predict")
    async def predict(image: Image) -> Prediction:
        pixels = np.array(image.pixels, np.float32).reshape(1, 3, 64, 64)
        return Prediction(score=session.run(["score"], {"pixels": pixels})[0][0, 0])


def serve_w3b() -> None:
    session = open_onnx("w3")

    @app.post("/predict")
    async def predict(request: Request) -> Prediction:
        pixels = np.frombuffer(await request.body(), "<f4").reshape(1, 3, 64, 64)
        return Prediction(score=session.run(["score"], {"pixels": pixels})[0][0, 0])


def serve_w4() -> None:
    session = open_onnx("w4")

    @app.post("/predict")
    async def predict(text: Text) -> Prediction:
        tokens = np.array([text.tokens], np.int64)
        mask = np.ones(tokens.shape, np.float32)
        return Prediction(score=session.run(["score"], {"tokens": tokens, "mask": mask})[0][0, 0])


def serve_fire() -> None:
    forest = joblib.load(MODELS / "w2" / "model.joblib")

    @app.post("/predict")
    async def predict(features: Features) -> Prediction:
        if features.f0 == POISON:
            raise ArithmeticError("poison")
        if features.f0 == HUGE:
            raise MemoryError
        return Prediction(score=forest.predict_proba(np.array([row_of(features)]))[0, 1])


SERVE: dict[str, Callable[[], None]] = {
    "w1": serve_w1,
    "w2": serve_w2,
    "w3": serve_w3,
    "w3b": serve_w3b,
    "w4": serve_w4,
    "fire": serve_fire,
}
SERVE[WORKLOAD]()
