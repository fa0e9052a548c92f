"""Bakes the template, from a clean copy of what git knows, and runs what was baked."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.containers import Containers, missing_tools

REPOSITORY = Path(__file__).parents[1]
TEMPLATE = REPOSITORY / "{{cookiecutter.project_slug}}"
KINDS = ("onnx", "sklearn", "image")

# What somebody has set in their shell is not what a baked project is tested with.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name
    not in {"ARTIFACTS_DIR", "DEFAULT_MODEL", "MAKEFLAGS", "MAKELEVEL", "PORT", "VIRTUAL_ENV"}
}


@dataclass(frozen=True)
class BakedProject:
    """A project that the template has made."""

    path: Path

    def files(self) -> set[str]:
        paths = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        return {path.as_posix() for path in paths}

    def read(self, path: str) -> str:
        return (self.path / path).read_text(encoding="utf-8")

    def write(self, path: str, text: str) -> None:
        (self.path / path).write_text(text, encoding="utf-8")

    def run(self, *command: str) -> str:
        """What `command` prints in the project's folder; it has to succeed."""
        result = subprocess.run(
            command, cwd=self.path, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
        return result.stdout


@dataclass(frozen=True)
class Refusal:
    """What became of an answer that the template does not take."""

    returncode: int
    errors: list[str]
    left_behind: list[Path]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as git would hand it out, with the changes that are not committed yet."""
    copy = tmp_path_factory.mktemp("template")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, copy / name)
    return copy


def cookiecutter(
    template: Path, output: Path, answers: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    pairs = [f"{name}={answer}" for name, answer in answers.items()]
    command = ["cookiecutter", "--no-input", "--output-dir", str(output), str(template), *pairs]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def make_project(template: Path, output: Path, **answers: str) -> BakedProject:
    """Bakes with the given answers, the defaults for the others; it has to succeed."""
    result = cookiecutter(template, output, answers)
    assert result.returncode == 0, result.stdout + result.stderr
    [project] = [path for path in output.iterdir() if (path / "pyproject.toml").exists()]
    return BakedProject(project)


@pytest.fixture
def bake(template: Path, tmp_path: Path) -> Callable[..., BakedProject]:
    return partial(make_project, template, tmp_path)


@pytest.fixture(scope="session")
def artifacts(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts/ of a default project, for those to copy who only serve its model."""
    project = make_project(template, tmp_path_factory.mktemp("trained"))
    project.run("python", "-m", "training.fraud")
    return project.path / "artifacts"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def refuse(template: Path, tmp_path: Path) -> Callable[..., Refusal]:
    """Bakes with answers that must be refused."""

    def refuse(**answers: str) -> Refusal:
        output = tmp_path / "around" / "output"
        output.mkdir(parents=True)
        result = cookiecutter(template, output, answers)
        lines = (result.stdout + result.stderr).splitlines()
        errors = [line for line in lines if "cannot be used" in line]
        left = [path for path in (tmp_path / "around").rglob("*") if path != output]
        return Refusal(result.returncode, errors, left)

    return refuse


@pytest.fixture(scope="session")
def containers() -> Iterator[Containers]:
    """What builds and runs images here, with the base image of the Dockerfile."""
    if missing := missing_tools():
        pytest.skip(f"images and manifests are not tested without {', '.join(missing)}")
    dockerfile = (TEMPLATE / "Dockerfile").read_text(encoding="utf-8")
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", dockerfile, re.MULTILINE)
    # Not of pytest's: podman takes none but short paths.
    with TemporaryDirectory(prefix="containers-") as folder:
        containers = Containers(Path(folder))
        containers.make_base(base)
        yield containers
        containers.buildah("rm", "--all")
        containers.buildah("rmi", "--all", "--force")
