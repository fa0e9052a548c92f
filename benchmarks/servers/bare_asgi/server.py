"""A model behind the least that is a server: ASGI by hand, the model run inline, no checks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import orjson  # type: ignore[import-not-found]

MODELS = Path(os.environ["MODELS"])
WORKLOAD = os.environ["WORKLOAD"]
FEATURES = [f"f{number}" for number in range(8)]
POISON = 666.0
HUGE = 777.0


def open_onnx(name: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    path = MODELS / name / "model.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def features(body: bytes) -> list[float]:
    row = orjson.loads(body)
    return [row[name] for name in FEATURES]


def make_w1() -> Callable[[bytes], float]:
    session = open_onnx("w1")

    def score(body: bytes) -> float:
        rows = np.array([features(body)], np.float32)
        return float(session.run(["probabilities"], {"rows": rows})[0][0, 1])

    return score


def make_w2() -> Callable[[bytes], float]:
    forest = joblib.load(MODELS / "w2" / "model.joblib")
    return lambda body: float(forest.predict_proba(np.array([features(body)]))[0, 1])


def make_w3() -> Callable[[bytes], float]:
    session = open_onnx("w3")

    def score(body: bytes) -> float:
        pixels = np.array(orjson.loads(body)["pixels"], np.float32).reshape(1, 3, 64, 64)
        return float(session.run(["score"], {"pixels": pixels})[0][0, 0])

    return score


def make_w3b() -> Callable[[bytes], float]:
    session = open_onnx("w3")

    def score(body: bytes) -> float:
        pixels = np.frombuffer(body, "<f4").reshape(1, 3, 64, 64)
        return float(session.run(["score"], {"pixels": pixels})[0][0, 0])

    return score


def make_w4() -> Callable[[bytes], float]:
    session = open_onnx("w4")

    def score(body: bytes) -> float:
        tokens = np.array([orjson.loads(body)["tokens"]], np.int64)
        mask = np.ones(tokens.shape, np.float32)
        return float(session.run(["score"], {"tokens": tokens, "mask": mask})[0][0, 0])

    return score


def make_fire() -> Callable[[bytes], float]:
    forest = make_w2()

    def score(body: bytes) -> float:
        if orjson.loads(body)["f0"] == POISON:
            raise ArithmeticError("poison")
        if orjson.loads(body)["f0"] == HUGE:
            raise MemoryError
        return forest(body)

    return score


MAKERS = {
    "w1": make_w1,
    "w2": make_w2,
    "w3": make_w3,
    "w3b": make_w3b,
    "w4": make_w4,
    "fire": make_fire,
}
score = MAKERS[WORKLOAD]()


async def read_body(receive: Any) -> bytes:
    message = await receive()
    body: bytes = message["body"]
    chunks = [body]
    while message["more_body"]:
        message = await receive()
        chunks.append(message["body"])
    return b"".join(chunks)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["method"] == "GET":
        answer = b"{}"
    else:
        answer = orjson.dumps({"score": score(await read_body(receive))})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(answer)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
