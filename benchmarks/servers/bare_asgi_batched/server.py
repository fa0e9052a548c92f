"""The same with the least that is a batcher: a queue, a window, and the model on one thread.

A batch is formed when the model is free: the first request opens a window of 5 ms, in which up
to 31 others can join.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
WINDOW_S = 0.005
MAX_ROWS = 32


def open_onnx(name: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    path = MODELS / name / "model.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def parse_features(body: bytes) -> list[float]:
    row = orjson.loads(body)
    return [row[name] for name in FEATURES]


def parse_pixels(body: bytes) -> Any:
    return np.array(orjson.loads(body)["pixels"], np.float32)


def parse_bytes(body: bytes) -> Any:
    return np.frombuffer(body, "<f4")


def parse_tokens(body: bytes) -> list[int]:
    tokens: list[int] = orjson.loads(body)["tokens"]
    return tokens


def make_w1() -> Callable[[list[Any]], list[float]]:
    session = open_onnx("w1")

    def score(rows: list[Any]) -> list[float]:
        answer = session.run(["probabilities"], {"rows": np.array(rows, np.float32)})
        scores: list[float] = answer[0][:, 1].tolist()
        return scores

    return score


def make_w2() -> Callable[[list[Any]], list[float]]:
    forest = joblib.load(MODELS / "w2" / "model.joblib")

    def score(rows: list[Any]) -> list[float]:
        scores: list[float] = forest.predict_proba(np.array(rows))[:, 1].tolist()
        return scores

    return score


def make_w3() -> Callable[[list[Any]], list[float]]:
    session = open_onnx("w3")

    def score(rows: list[Any]) -> list[float]:
        pixels = np.stack(rows).reshape(-1, 3, 64, 64)
        scores: list[float] = session.run(["score"], {"pixels": pixels})[0][:, 0].tolist()
        return scores

    return score


def make_w4() -> Callable[[list[Any]], list[float]]:
    session = open_onnx("w4")

    def score(rows: list[Any]) -> list[float]:
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros(tokens.shape, np.float32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            mask[number, : len(row)] = 1
        answer = session.run(["score"], {"tokens": tokens, "mask": mask})
        scores: list[float] = answer[0][:, 0].tolist()
        return scores

    return score


def make_fire() -> Callable[[list[Any]], list[float]]:
    forest = make_w2()

    def score(rows: list[Any]) -> list[float]:
        if any(row[0] == POISON for row in rows):
            raise ArithmeticError("poison")
        if any(row[0] == HUGE for row in rows):
            raise MemoryError
        return forest(rows)

    return score


MAKERS = {
    "w1": (parse_features, make_w1),
    "w2": (parse_features, make_w2),
    "w3": (parse_pixels, make_w3),
    "w3b": (parse_bytes, make_w3),
    "w4": (parse_tokens, make_w4),
    "fire": (parse_features, make_fire),
}
parse: Callable[[bytes], Any] = MAKERS[WORKLOAD][0]
score = MAKERS[WORKLOAD][1]()
thread = ThreadPoolExecutor(1)
queue: asyncio.Queue[tuple[Any, asyncio.Future[float]]] = asyncio.Queue()


async def batch() -> None:
    loop = asyncio.get_running_loop()
    while True:
        waiting = [await queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(WINDOW_S):
                while len(waiting) < MAX_ROWS:
                    waiting.append(await queue.get())
        try:
            scores = await loop.run_in_executor(thread, score, [row for row, _ in waiting])
        except Exception as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            continue
        for (_, future), value in zip(waiting, scores, strict=True):
            if not future.done():
                future.set_result(value)


async def read_body(receive: Any) -> bytes:
    message = await receive()
    body: bytes = message["body"]
    chunks = [body]
    while message["more_body"]:
        message = await receive()
        chunks.append(message["body"])
    return b"".join(chunks)


async def serve_lifespan(receive: Any, send: Any) -> None:
    await receive()
    task = asyncio.create_task(batch())
    await send({"type": "lifespan.startup.complete"})
    await receive()
    task.cancel()
    await send({"type": "lifespan.shutdown.complete"})


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await serve_lifespan(receive, send)
        return
    if scope["method"] == "GET":
        answer = b"{}"
    else:
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        queue.put_nowait((parse(await read_body(receive)), future))
        answer = orjson.dumps({"score": await future})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(answer)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
