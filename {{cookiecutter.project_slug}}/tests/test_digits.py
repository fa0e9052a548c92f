"""The digit model, over HTTP: the same answers as the model itself, and refusal of bad input."""

import base64
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sklearn.datasets import load_digits

from app import artifacts
from app.settings import Settings
from predictors.digits import MAX_FILE_BYTES, MAX_SIDE_PIXELS

MODEL = Path(__file__).stem.removeprefix("test_")
URL = f"/v1/models/{MODEL}/predict"


def encode(image: Image.Image, file_format: str = "PNG") -> str:
    file = BytesIO()
    image.save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


def as_image(pixels: Any) -> Image.Image:
    """A picture of 64 numbers from 0 to 16."""
    return Image.fromarray(np.round(pixels.reshape(8, 8) * 255 / 16).astype(np.uint8))


def test_answers_are_those_of_the_model_called_directly(client: TestClient) -> None:
    pixels, digits = load_digits(return_X_y=True)
    version = artifacts.newest(Settings().artifacts_dir, MODEL).directory
    session = ort.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])

    instances = [{"image": encode(as_image(row))} for row in pixels[:200]]
    predictions = client.post(f"{URL}/batch", json={"instances": instances}).json()["predictions"]

    # A PNG has 256 shades and the data set 17, so the pixels come back rounded.
    seen = np.round(pixels[:200] * 255 / 16) * 16 / 255
    [expected] = session.run(["probabilities"], {"pixels": seen.astype(np.float32)})
    for prediction, row in zip(predictions, expected.tolist(), strict=True):
        assert prediction["probabilities"] == pytest.approx(row, abs=1e-5)
    right = sum(
        prediction["digit"] == digit
        for prediction, digit in zip(predictions, digits[:200], strict=True)
    )
    assert right >= 190


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(lambda digit: encode(digit.resize((64, 64))), id="larger"),
        pytest.param(lambda digit: encode(digit.convert("RGB")), id="colour"),
        pytest.param(lambda digit: encode(digit.convert("P")), id="palette"),
        pytest.param(lambda digit: encode(digit.resize((64, 64)), "JPEG"), id="JPEG"),
    ],
)
def test_other_sizes_colours_and_formats_are_read(client: TestClient, image: Any) -> None:
    pixels, digits = load_digits(return_X_y=True)
    answer = client.post(URL, json={"features": {"image": image(as_image(pixels[0]))}})
    assert answer.json()["prediction"]["digit"] == digits[0]


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> str:
    """A PNG of these chunks, as kind and content, in base64."""
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        file += struct.pack(">I", len(data)) + kind + data + checksum
    return base64.b64encode(file).decode()


def png_that_claims(width: int, height: int) -> str:
    """A PNG of a few bytes whose header speaks of far more pixels than it has."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png(header, (b"IDAT", zlib.compress(b"\0")))


PALETTE_WITHOUT_COLOURS = png(
    struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0),
    (b"tRNS", b"\0"),
    (b"IDAT", zlib.compress(b"\0\0")),
)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param("not base64!", id="not base64"),
        pytest.param("", id="empty"),
        pytest.param(base64.b64encode(b"GIF89a nonsense").decode(), id="not an image"),
        pytest.param(encode(Image.new("L", (8, 8)), "GIF"), id="another format"),
        pytest.param(encode(Image.new("L", (8, 8)))[:60], id="cut off"),
        pytest.param(encode(Image.new("L", (MAX_SIDE_PIXELS + 1, 8))), id="too wide"),
        pytest.param(png_that_claims(60_000, 60_000), id="decompression bomb"),
        pytest.param(PALETTE_WITHOUT_COLOURS, id="palette without colours"),
        pytest.param(png_that_claims(8, 8), id="fewer pixels than it claims"),
        pytest.param("A" * (MAX_FILE_BYTES * 4 // 3 + 8), id="too many bytes"),
        pytest.param(7, id="a number"),
    ],
)
def test_a_bad_image_is_refused_by_the_name_of_its_field(client: TestClient, image: Any) -> None:
    answer = client.post(URL, json={"features": {"image": image}})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["features.image"]


def test_a_bad_image_in_a_batch_is_named_by_its_row(client: TestClient) -> None:
    good = {"image": encode(Image.new("L", (8, 8)))}
    bad = {"image": base64.b64encode(b"nonsense").decode()}
    answer = client.post(f"{URL}/batch", json={"instances": [good, bad, good]})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["instances.1.image"]
