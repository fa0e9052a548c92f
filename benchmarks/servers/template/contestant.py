"""The service that this template makes, with everything on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants import (
    AnswerPath,
    Command,
    Contestant,
    NotSupportedError,
    Place,
    Request,
)
from benchmarks.workloads import Body

HERE = Path(__file__).parent
SLUG = "benchmarked"
MODELS = {
    "w1": "w1/model.onnx",
    "w2": "w2/model.joblib",
    "w3": "w3/model.onnx",
    "w3_fixed": "w3/model.onnx",
    "w3_pipelined": "w3/model.onnx",
    "w4": "w4/model.onnx",
    "fire": "w2/model.joblib",
}
"""The file that each predictor opens; they are in predictors/."""


def prepare(place: Place) -> None:
    """Make a project of the template, and publish the models in it."""
    for made in (place.home / SLUG, place.home / "artifacts", place.home / "predictors"):
        shutil.rmtree(made, ignore_errors=True)
    answers = ["model_kind=onnx", f"project_name={SLUG}"]
    _run([sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", str(place.home),
          str(place.template), *answers], place.home)  # fmt: skip
    for model, file in MODELS.items():
        if not supports(place, model):
            continue
        # A folder for each, as a process serves all models that it finds.
        folder = _predictors(place, model)
        folder.mkdir(parents=True)
        shutil.copy(HERE / "predictors" / f"{model}.py", folder)
        publish = ["-m", "app.publish", model, str(place.models / file)]
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        _run([str(place.python), *publish], place.home / SLUG, environment | settings(place, model))


def supports(place: Place, model: str) -> bool:
    """Versions before app/tensor.py have no arrays as features."""
    return "w3" not in model or (place.home / SLUG / "app" / "tensor.py").is_file()


def _predictors(place: Place, model: str) -> Path:
    return place.home / "predictors" / model


def settings(place: Place, model: str) -> dict[str, str]:
    return {
        "PREDICTORS_DIR": str(_predictors(place, model)),
        "ARTIFACTS_DIR": str(place.home / "artifacts"),
        "DEFAULT_MODEL": model,
        "BIND_ADDRESS": "127.0.0.1",
        # The requests repeat themselves, and the others have no cache.
        "CACHE_ENABLED": "false",
    }


def _run(arguments: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def start(place: Place, workload: str, port: int) -> Command:
    # A predictor of one array takes it as JSON and as bytes.
    model = "w3" if workload == "w3b" else workload
    if not supports(place, model):
        raise NotSupportedError("this version of the template has no arrays as features")
    environment = settings(place, model) | {"PORT": str(port)}
    return Command([str(place.python), "-m", "app"], place.home / SLUG, environment)


def request(_: str, body: Body) -> Request:
    path, answer_path = "/v1/predict", ("prediction", "score")
    if isinstance(body, bytes):
        return Request(path, "application/octet-stream", body, answer_path)
    content = json.dumps({"features": body}).encode()
    return Request(path, "application/json", content, answer_path)


def batch_request(bodies: Sequence[Body]) -> tuple[Request, list[AnswerPath]]:
    """A request of several rows, and where the answer has the score of each."""
    content = json.dumps({"instances": bodies}).encode()
    paths: list[AnswerPath] = [("predictions", row, "score") for row in range(len(bodies))]
    return Request("/v1/predict/batch", "application/json", content, paths[0]), paths


CONTESTANT = Contestant(
    title="this template",
    start=start,
    ready_path="/ready",
    health_path="/health",
    request=request,
    prepare=prepare,
)
