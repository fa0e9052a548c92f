"""The workloads: their models, made once from fixed seeds, request bodies, and right answers.

Every model answers a row with one number, its score.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper
from skl2onnx import to_onnx  # type: ignore[import-untyped]
from skl2onnx.common.data_types import FloatTensorType  # type: ignore[import-untyped]
from sklearn.ensemble import RandomForestClassifier  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

Body = dict[str, Any] | bytes
"""The fields of one row; or the bytes of one tensor, float32 in C order, little-endian."""

SEED = 20_261_122
BODIES = 64
"""Distinct requests for each workload."""

FEATURES = [f"f{number}" for number in range(8)]
IMAGE = (3, 64, 64)
TOKENS = 1000
MAX_LENGTH = 128

POISON = 666.0
HUGE = 777.0
"""As f0, what the variant of w2 for benchmarks.fire raises at."""

TOLERANCE = 1e-5
"""Largest difference of a score from that of the model asked directly, one row at a time."""


@dataclass(frozen=True)
class Workload:
    name: str
    model: str
    """The folder of its model."""

    bodies: list[Body]
    expected: list[float]
    """The score of each body."""


WORKLOADS = {
    "w1": "logistic regression in ONNX, 8 numbers",
    "w2": "random forest of 200 trees, 8 numbers",
    "w3": "convnet in ONNX on 3x64x64, as JSON",
    "w3b": "the same convnet, as 49,152 raw bytes",
    "w4": "attention over 4 to 128 tokens in ONNX, padded",
}


def open_onnx(path: Path) -> Any:
    """A session on one thread, as every contestant has it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_models(folder: Path) -> None:
    """Make what is not there yet, or was made by another version of this file or its packages."""
    packages = ["numpy", "onnx", "scikit-learn", "skl2onnx"]
    stamp = "\n".join(
        [
            hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            *(f"{package} {version(package)}" for package in packages),
        ]
    )
    stamp_path = folder / "made-by.txt"
    if stamp_path.is_file() and stamp_path.read_text() == stamp:
        return
    for name in ("w1", "w2", "w3", "w4"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "w1" / "model.onnx").write_bytes(_logistic_regression())
    joblib.dump(_random_forest(), folder / "w2" / "model.joblib")
    (folder / "w3" / "model.onnx").write_bytes(_convnet().SerializeToString())
    (folder / "w4" / "model.onnx").write_bytes(_attention().SerializeToString())
    stamp_path.write_text(stamp)


def make_workload(name: str, models: Path) -> Workload:
    """The bodies of a workload, and their scores by its model in `models`."""
    model = {"w3b": "w3", "fire": "w2"}.get(name, name)
    bodies, expected = _MAKERS[name](models / model)
    return Workload(name, model, bodies, expected)


def make_fresh(name: str, models: Path, count: int) -> Workload:
    """`count` rows for w1 or w2 that nobody has sent yet, with their scores."""
    random = np.random.default_rng(SEED + 4)
    rows = random.normal(size=(count, len(FEATURES)))
    folder = models / name
    if name == "w1":
        feed = {"rows": rows.astype(np.float32)}
        scores = open_onnx(folder / "model.onnx").run(["probabilities"], feed)[0][:, 1]
    else:
        scores = joblib.load(folder / "model.joblib").predict_proba(rows)[:, 1]
    return Workload(name, name, _as_fields(rows), scores.tolist())


def _training_rows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    random = np.random.default_rng(SEED)
    rows = random.normal(size=(4000, len(FEATURES))).astype(np.float32)
    noise = 0.3 * random.normal(size=len(rows))
    labels = (rows[:, 0] * rows[:, 1] + rows[:, 2] + noise > 0).astype(np.int64)
    return rows, labels


def _logistic_regression() -> bytes:
    model = LogisticRegression().fit(*_training_rows())
    inputs = [("rows", FloatTensorType([None, len(FEATURES)]))]
    options = {id(model): {"zipmap": False}}
    content: bytes = to_onnx(model, initial_types=inputs, options=options).SerializeToString()
    return content


def _random_forest() -> Any:
    model = RandomForestClassifier(n_estimators=200, max_depth=10, random_state=SEED, n_jobs=1)
    return model.fit(*_training_rows())


class _Weights:
    """Random weights of a graph, scaled so that signals keep their size."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(SEED)
        self.tensors: list[TensorProto] = []

    def add(self, name: str, *shape: int, fan_in: int) -> None:
        values = self._random.normal(0, fan_in**-0.5, shape).astype(np.float32)
        self.tensors.append(numpy_helper.from_array(values, name))

    def constant(self, name: str, values: Any) -> None:
        self.tensors.append(numpy_helper.from_array(np.asarray(values), name))


def _model(
    name: str,
    nodes: list[tuple[Any, ...]],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    weights: _Weights,
) -> ModelProto:
    """A graph of `nodes`, each (operator, its inputs, its output, attributes), that ends in
    `score` of shape rows x 1. `inputs` are (type, shape) by name."""
    graph = helper.make_graph(
        [
            helper.make_node(operator, arguments.split(), [output], **attributes)
            for operator, arguments, output, attributes in nodes
        ],
        name,
        [helper.make_tensor_value_info(key, *value) for key, value in inputs.items()],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["rows", 1])],
        weights.tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return model


def _convnet() -> ModelProto:
    """Half a million multiplications a row: 30 to 45 microseconds on one thread."""
    weights = _Weights()
    weights.add("kernel1", 8, 3, 3, 3, fan_in=14)
    weights.add("kernel2", 16, 8, 3, 3, fan_in=36)
    weights.add("weight", 16, 1, fan_in=16)
    nodes = [
        ("Conv", "pixels kernel1", "conv1", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Relu", "conv1", "relu1", {}),
        ("MaxPool", "relu1", "pool1", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Conv", "pool1 kernel2", "conv2", {"pads": [1, 1, 1, 1]}),
        ("Relu", "conv2", "relu2", {}),
        ("GlobalAveragePool", "relu2", "pool2", {}),
        ("Flatten", "pool2", "flat", {}),
        ("Gemm", "flat weight", "logit", {}),
        ("Sigmoid", "logit", "score", {}),
    ]
    return _model("convnet", nodes, {"pixels": (TensorProto.FLOAT, ["rows", *IMAGE])}, weights)


def _attention() -> ModelProto:
    """One head of attention over token embeddings, then the mean of what is not padding."""
    width = 64
    weights = _Weights()
    weights.add("embeddings", TOKENS, width, fan_in=1)
    for name in ("query", "key", "value", "hidden"):
        weights.add(name, width, width, fan_in=width)
    weights.add("weight", width, 1, fan_in=4)
    weights.constant("one", np.float32(1))
    weights.constant("far", np.float32(1e9))
    weights.constant("scale", np.float32(width**-0.5))
    weights.constant("axis1", np.array([1]))
    weights.constant("axis2", np.array([2]))
    nodes = [
        ("Gather", "embeddings tokens", "x", {}),
        ("MatMul", "x query", "q", {}),
        ("MatMul", "x key", "k", {}),
        ("MatMul", "x value", "v", {}),
        ("Transpose", "k", "kt", {"perm": [0, 2, 1]}),
        ("MatMul", "q kt", "products", {}),
        ("Mul", "products scale", "scaled", {}),
        # Padding gets -1e9 before the softmax, which is 0 after it.
        ("Sub", "mask one", "holes", {}),
        ("Mul", "holes far", "penalties", {}),
        ("Unsqueeze", "penalties axis1", "penalty", {}),
        ("Add", "scaled penalty", "masked", {}),
        ("Softmax", "masked", "shares", {"axis": -1}),
        ("MatMul", "shares v", "mixed", {}),
        ("Add", "mixed x", "residual", {}),
        ("MatMul", "residual hidden", "h", {}),
        ("Relu", "h", "active", {}),
        ("Unsqueeze", "mask axis2", "column", {}),
        ("Mul", "active column", "kept", {}),
        ("ReduceSum", "kept axis1", "sum", {"keepdims": 0}),
        ("ReduceSum", "mask axis1", "length", {"keepdims": 1}),
        ("Div", "sum length", "mean", {}),
        ("MatMul", "mean weight", "logit", {}),
        ("Sigmoid", "logit", "score", {}),
    ]
    shape = ["rows", "length"]
    inputs = {"tokens": (TensorProto.INT64, shape), "mask": (TensorProto.FLOAT, shape)}
    return _model("attention", nodes, inputs, weights)


_Made = tuple[list[Body], list[float]]


def _numbers() -> NDArray[np.float64]:
    random = np.random.default_rng(SEED + 1)
    return random.normal(size=(BODIES, len(FEATURES))).round(4)


def _as_fields(rows: NDArray[np.float64]) -> list[Body]:
    return [dict(zip(FEATURES, row, strict=True)) for row in rows.tolist()]


def _make_w1(model: Path) -> _Made:
    session, rows = open_onnx(model / "model.onnx"), _numbers()
    scores = [
        session.run(["probabilities"], {"rows": row[None].astype(np.float32)})[0][0, 1]
        for row in rows
    ]
    return _as_fields(rows), list(map(float, scores))


def _make_w2(model: Path) -> _Made:
    forest, rows = joblib.load(model / "model.joblib"), _numbers()
    return _as_fields(rows), forest.predict_proba(rows)[:, 1].tolist()


def _images() -> NDArray[np.float64]:
    random = np.random.default_rng(SEED + 2)
    # Of different contrast and brightness, or else a network of random weights would give all
    # of them nearly the same score, and a mix-up would not be seen.
    images = random.normal(size=(BODIES, *IMAGE)) * random.uniform(0.1, 2, (BODIES, 1, 1, 1))
    return (images + random.normal(size=(BODIES, 3, 1, 1))).round(4)


def _image_scores(model: Path, images: NDArray[np.float64]) -> list[float]:
    session = open_onnx(model / "model.onnx")
    scores = [
        session.run(["score"], {"pixels": image[None].astype(np.float32)})[0].item()
        for image in images
    ]
    return list(map(float, scores))


def _make_w3(model: Path) -> _Made:
    images = _images()
    return [{"pixels": image.ravel().tolist()} for image in images], _image_scores(model, images)


def _make_w3b(model: Path) -> _Made:
    images = _images()
    return [image.astype("<f4").tobytes() for image in images], _image_scores(model, images)


def _make_w4(model: Path) -> _Made:
    session, random = open_onnx(model / "model.onnx"), np.random.default_rng(SEED + 3)
    # As texts are: most are short, a few are long.
    lengths = np.clip(random.lognormal(np.log(24), 0.8, BODIES), 4, MAX_LENGTH).astype(int)
    lengths[:2] = 4, MAX_LENGTH
    bodies: list[Body] = []
    scores = []
    for length in lengths.tolist():
        tokens = random.integers(0, TOKENS, length)
        feed = {"tokens": tokens[None], "mask": np.ones((1, length), np.float32)}
        scores.append(float(session.run(["score"], feed)[0].item()))
        bodies.append({"tokens": tokens.tolist()})
    return bodies, scores


_MAKERS: dict[str, Callable[[Path], _Made]] = {
    "w1": _make_w1,
    "w2": _make_w2,
    "w3": _make_w3,
    "w3b": _make_w3b,
    "w4": _make_w4,
    "fire": _make_w2,
}
