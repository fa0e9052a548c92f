"""Projects in use: each kind passes its own checks, and does what its README says."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from urllib.error import HTTPError, URLError

import pytest

from tests.conftest import ENVIRONMENT, BakedProject, make_project

WAIT_S = 120

TESTS = [
    "tests/test_churn.py",
    "tests/service/test_api.py",
    "tests/service/test_requirements.py",
    "tests/service/test_start.py::TestImports",
    "tests/service/test_tensor.py",
]
"""Of a kind whose service is not tested as a whole: what could depend on its requirements."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(project: BakedProject, command: str) -> Iterator[int]:
    """Runs `command`, which serves the project, and waits until it is ready; on which port."""
    port = free_port()
    environment = ENVIRONMENT | {"PORT": str(port), "BIND_ADDRESS": "127.0.0.1"}
    log = project.path / "service.log"
    with log.open("wb") as output:
        service = subprocess.Popen(
            shlex.split(command), cwd=project.path, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = monotonic() + WAIT_S
        while True:
            assert service.poll() is None, log.read_text()
            assert monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                    break
            except (HTTPError, URLError, ConnectionError):
                sleep(0.1)
        yield port
    finally:
        service.terminate()
        service.wait()
        log.unlink()


def commands(document: str) -> list[str]:
    """The code blocks of a document that are for a shell."""
    return re.findall(r"```bash\n(.*?)```", document, flags=re.DOTALL)


@pytest.fixture(scope="module")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory, kind: str) -> BakedProject:
    """Of this kind: what one test has installed in it, the next one need not."""
    answers = {"model_kind": kind, "model_name": "churn", "project_name": "Churn"}
    project = make_project(template, tmp_path_factory.mktemp("projects"), **answers)
    project.run("git", "init", "--quiet")
    project.run("git", "add", "--all")
    return project


def test_it_passes_its_own_checks_and_keeps_what_its_readme_says(
    project: BakedProject, kind: str
) -> None:
    run, curl, make_key, *_ = commands(project.read("README.md"))
    with serving(project, run) as port:
        answer = json.loads(project.run("sh", "-c", curl.replace("8080", str(port))))
        assert answer["model"] == "churn"
        assert answer["prediction"]
        example = json.loads(curl.split(" -d '")[1].rstrip("\n'"))
        document = json.loads(project.run("curl", "-s", f"localhost:{port}/openapi.json"))
        body = document["paths"]["/v1/predict"]["post"]["requestBody"]
        assert body["content"]["application/json"]["schema"]["examples"] == [example]
        assert document["info"]["title"] == "Churn"
    key, digest = project.run("sh", "-c", make_key).split()
    assert len(key) == 43
    assert len(digest) == 64

    told = project.run("make", "load", "ARGS=--seconds 0.1")
    assert re.search(r"^BATCH_MAX_ROWS +\d", told, re.MULTILINE), told

    project.run("make", "lint")
    # The tests of the service itself are the same for each kind, and take minutes.
    test = ["make", "test"] if kind == "onnx" else [".venv/bin/python", "-m", "pytest", *TESTS]
    summary = project.run(*test).splitlines()[-1]
    assert re.search(r"\d+ passed", summary)
    assert "failed" not in summary
    assert "skipped" not in summary

    assert_only_ignored_files_are_new(project)


def assert_only_ignored_files_are_new(project: BakedProject) -> None:
    """And none that git has was changed, by formatting for one."""
    status = project.run("git", "status", "--porcelain").splitlines()
    assert [line for line in status if not line.startswith("A  ")] == []


def test_its_readme_says_how_to_do_without_make(bake: Callable[..., BakedProject]) -> None:
    project = bake()
    project.run("git", "init", "--quiet")
    project.run("git", "add", "--all")
    *_, install = commands(project.read("README.md"))
    project.run("sh", "-ec", install)
    table = re.findall(r"^\| `make ([\w-]+)` \| (.*) \|$", project.read("README.md"), re.MULTILINE)
    plain = {target: re.findall(r"`([^`]+)`", cell) for target, cell in table}
    images = {"image", "image-cuda", "run-image"}  # See test_image.py.
    assert plain.keys() == {"train", "run", "load", "test", "lint", "format", "lock"} | images
    train, serve = plain["run"]
    for command in [train, *plain["train"], *plain["lint"], *plain["format"]]:
        project.run("sh", "-c", command)
    project.run("sh", "-c", f"{plain['load'][-1]} --seconds 0.1")
    with serving(project, serve):
        pass
    assert_only_ignored_files_are_new(project)


@pytest.mark.parametrize("kind", ["image"], indirect=True)
def test_training_again_gives_the_same_files(project: BakedProject) -> None:
    # With these two, sets of strings come in different orders.
    for seed in ("1", "30"):
        project.run("env", f"PYTHONHASHSEED={seed}", "make", "train")
    manifests = list(project.path.glob("artifacts/churn/*/manifest.json"))
    assert len(manifests) >= 2
    first, *others = [json.loads(manifest.read_text())["files"] for manifest in manifests]
    assert all(files == first for files in others)


@pytest.mark.parametrize("kind", ["sklearn"], indirect=True)
def test_a_pickle_that_was_swapped_is_never_opened(project: BakedProject, tmp_path: Path) -> None:
    project.run("make", "install", "train")
    artifacts = shutil.copytree(project.path / "artifacts", tmp_path / "artifacts")
    newest = max((artifacts / "churn").iterdir(), key=lambda version: int(version.name))
    bomb = f"import pathlib; pathlib.Path({str(tmp_path / 'pwned')!r}).touch()"
    project.run(
        ".venv/bin/python",
        "-c",
        "import pickle, types\n"
        f"class Bomb:\n    def __reduce__(self): return (exec, ({bomb!r},))\n"
        f"pickle.dump(Bomb(), open({str(newest / 'model.joblib')!r}, 'wb'))",
    )
    service = subprocess.run(
        [".venv/bin/python", "-m", "app"],
        cwd=project.path,
        env=ENVIRONMENT | {"PORT": str(free_port()), "ARTIFACTS_DIR": str(artifacts)},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert service.returncode != 0
    assert "model.joblib is not the file that was published" in service.stderr
    assert not (tmp_path / "pwned").exists()


STRANGER_PREDICTOR = '''
"""Progression of diabetes one year on."""

from pathlib import Path
from typing import Any

import joblib
import numpy as np
from pydantic import Field

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    measurements: list[float] = Field(min_length=10, max_length=10)


class Prediction(BasePrediction):
    progression: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(measurements=[59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87])

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.model: Any = joblib.load(artifact_dir / "diabetes.joblib")

    def predict(self, batch: list[Features]) -> list[Prediction]:
        rows = np.array([row.measurements for row in batch])
        return [Prediction(progression=value) for value in self.model.predict(rows)]
'''
STRANGER_MODEL = """
import joblib
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
joblib.dump(Ridge().fit(*load_diabetes(return_X_y=True, scaled=False)), "diabetes.joblib")
"""


@pytest.mark.parametrize("kind", ["sklearn"], indirect=True)
def test_a_second_model_is_one_more_file_and_its_artifact(project: BakedProject) -> None:
    project.run("make", "install", "train")
    project.write("predictors/diabetes.py", STRANGER_PREDICTOR.lstrip())
    project.run(".venv/bin/python", "-c", STRANGER_MODEL)
    project.run(".venv/bin/python", "-m", "app.publish", "diabetes", "diabetes.joblib")
    project.run(".venv/bin/ruff", "check", "predictors")
    project.run(".venv/bin/mypy")

    body = '{"features": {"measurements": [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87]}}'
    with serving(project, "make run") as port:
        url = f"localhost:{port}/v1/models/diabetes/predict"
        answer = json.loads(
            project.run("curl", "-s", url, "-H", "Content-Type: application/json", "-d", body)
        )
        models = json.loads(project.run("curl", "-s", f"localhost:{port}/v1/models"))["models"]
    expected = project.run(
        ".venv/bin/python",
        "-c",
        "import joblib; print(joblib.load('diabetes.joblib').predict("
        "[[59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87]])[0])",
    )
    assert answer["prediction"]["progression"] == pytest.approx(float(expected))
    assert [(model["name"], model["is_default"]) for model in models] == [
        ("churn", True),
        ("diabetes", False),
    ]
