"""Trains the sample digit model and publishes it as the next version.

    python -m training.digits

The data are the 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler

from app.artifacts import new_version
from app.reference import describe
from app.settings import load_settings
from predictors.digits import SIDE, Features, Predictor

MODEL = Path(__file__).stem
SEED = 20_261_122

TOLERANCE = 1e-5
"""Largest difference of a probability between scikit-learn and the exported graph."""


def export(pipeline: Pipeline) -> bytes:
    """The pipeline as an ONNX graph with one input, `pixels` of shape (rows, 64)."""
    options = {id(pipeline): {"zipmap": False}}
    inputs = [("pixels", FloatTensorType([None, 64]))]
    model = to_onnx(pipeline, initial_types=inputs, options=options)
    # skl2onnx lists them in the order of a set, which differs from one process to the next.
    model.opset_import.sort(key=lambda opset: opset.domain)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def largest_difference(pipeline: Pipeline, model: bytes, pixels: Any) -> float:
    """Between the probabilities of `pipeline` and those of the exported `model`."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    [exported] = session.run(["probabilities"], {"pixels": pixels})
    return float(np.abs(pipeline.predict_proba(pixels) - exported).max())


def as_png(pixels: NDArray[np.float32]) -> bytes:
    """The 64 numbers from 0 to 16 of a digit as a file."""
    file = BytesIO()
    image = Image.fromarray((pixels.reshape(SIDE, SIDE) * (255 / 16)).round().astype(np.uint8))
    image.save(file, format="PNG")
    return file.getvalue()


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels.astype(np.float32), digits, test_size=0.25, random_state=SEED, stratify=digits
    )
    classifier = MLPClassifier(hidden_layer_sizes=(64,), max_iter=400, random_state=SEED)
    pipeline = make_pipeline(MinMaxScaler(), classifier).fit(train_x, train_y)
    model = export(pipeline)

    difference = largest_difference(pipeline, model, test_x)
    if difference > TOLERANCE:
        raise SystemExit(f"The ONNX graph differs from scikit-learn by {difference:.2g}.")
    accuracy = float(pipeline.score(test_x, test_y))

    with new_version(
        load_settings().artifacts_dir,
        MODEL,
        input_schema=Features.model_json_schema(),
        trained_with=["scikit-learn", "skl2onnx", "onnx"],
        metrics={"accuracy": round(accuracy, 4)},
    ) as directory:
        (directory / "model.onnx").write_bytes(model)
        # What the service will be measured against, to see when digits are no longer like these.
        sample = [Features.model_construct(image=as_png(image)) for image in test_x]
        describe(directory, Predictor, sample)
    print(f"{MODEL}: accuracy {accuracy:.3f}; the ONNX graph agrees within {difference:.1e}.")


if __name__ == "__main__":
    main()
