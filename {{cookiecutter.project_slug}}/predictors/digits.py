"""Handwritten digits: an ONNX model on images. This is the file to edit: make it yours.

The service finds it by its name, checks requests against `Features`, and calls `predict`.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Base64Bytes, Field

from app.onnx import open_session, provider_of
from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device, ItemError

MAX_FILE_BYTES = 256 * 1024
MAX_SIDE_PIXELS = 1024
SIDE = 8
"""The model sees 8 x 8 pixels, of 0 (background) to 16 (ink)."""


class Features(BaseFeatures):
    """What a caller sends: an image file in base64."""

    image: Base64Bytes = Field(
        max_length=MAX_FILE_BYTES,
        description=(
            "A PNG or JPEG file, in base64, of one digit, bright on a dark background; "
            f"at most {MAX_FILE_BYTES} bytes and {MAX_SIDE_PIXELS} pixels a side"
        ),
    )


class Prediction(BasePrediction):
    """What the caller gets back."""

    digit: int = Field(ge=0, le=9)
    probabilities: list[float] = Field(min_length=10, max_length=10)


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(
        image=(
            b"iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAARklEQVR42gXBYRVAMBgAwHt7/vsi"
            b"aGCaLIJGIqyCBp4EI4E1III7lLYFaG99i0Gelh55T+LqbpI4GUm+WeQP01PqAdZW8QOg+BHx1aT2"
            b"vAAAAABJRU5ErkJggg=="
        )
    )

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.session = open_session(artifact_dir / "model.onnx", device)
        self.provider = provider_of(self.session)

    def predict(self, batch: list[Features]) -> list[Prediction | ItemError]:
        images = [decode(row.image) for row in batch]
        pixels = [image for image in images if not isinstance(image, ItemError)]
        digits = iter(self._predict_pixels(pixels))
        return [image if isinstance(image, ItemError) else next(digits) for image in images]

    def _predict_pixels(self, images: list[NDArray[np.float32]]) -> list[Prediction]:
        if not images:
            return []
        [probabilities] = self.session.run(["probabilities"], {"pixels": np.stack(images)})
        return [
            Prediction(digit=int(np.argmax(row)), probabilities=row.tolist())
            for row in probabilities
        ]


def decode(file: bytes) -> NDArray[np.float32] | ItemError:
    """The image file as 64 numbers from 0 to 16, row by row, float32."""
    try:
        # Opening reads the header alone, so an image that is too large is never unpacked.
        with Image.open(BytesIO(file), formats=["PNG", "JPEG"]) as image:
            if max(image.size) > MAX_SIDE_PIXELS:
                return ItemError(f"more than {MAX_SIDE_PIXELS} pixels a side", field="image")
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    except Exception:  # Pillow raises many kinds, AssertionError among them, for broken files.
        return ItemError("not a PNG or JPEG file that can be read", field="image")
    return np.asarray(small, dtype=np.float32).reshape(SIDE * SIDE) * np.float32(16 / 255)
