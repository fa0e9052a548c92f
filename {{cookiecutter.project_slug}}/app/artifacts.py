"""Model files: `<artifacts>/<model>/<version>/` with a manifest, and the proof that they are right.

The manifest catches a truncated copy, a file swapped by mistake and a half-finished deployment.
It lies beside the files, so it is no defence against somebody who can write to both: a pickle
(joblib) runs code when it is opened, so publish only what you trained or trust.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from app.errors import StartupError

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What a version holds and where it came from."""

    files: dict[str, str] = Field(min_length=1)
    """SHA-256, in hex, by file name relative to the manifest."""

    created: datetime
    trained_with: dict[str, str] = {}
    """Version of each package that made the files, and of Python."""

    metrics: dict[str, float] = {}
    """How good the model was when it was trained."""

    input_schema: dict[str, Any] = {}
    """JSON schema of `Features` as it was then."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} points outside of its folder")
        return self


Stamps = list[tuple[int, int]]
"""Size and time of the last change, of files."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """One version of one model, as it lies on disk."""

    model: str
    version: str
    directory: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files: equal exactly when they all are."""
        lines = sorted(f"{digest}  {name}" for name, digest in self.manifest.files.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def stamps(self) -> Stamps:
        """Of each file that is there; others if one is written to or replaced."""
        paths = (self.directory / name for name in (MANIFEST, *self.manifest.files))
        found = [path.stat() for path in paths if path.is_file()]
        return [(file.st_size, file.st_mtime_ns) for file in found]

    def verify(self) -> None:
        """Compare the files with the manifest.

        Raises:
            StartupError: a file is missing, altered, or was never listed.
        """
        for name, expected in self.manifest.files.items():
            path = self.directory / name
            if not path.is_file():
                raise StartupError(f"{self.model}: {path} is missing; {_REPUBLISH}")
            if sha256(path) != expected:
                raise StartupError(
                    f"{self.model}: {path} is not the file that was published "
                    f"(its SHA-256 differs from {MANIFEST}); {_REPUBLISH}"
                )
        for name in file_names(self.directory):
            if name not in self.manifest.files:
                raise StartupError(
                    f"{self.model}: {self.directory / name} is not listed in {MANIFEST}; "
                    f"remove it, or {_REPUBLISH}"
                )


_REPUBLISH = "publish the version again (make train, or python -m app.publish)"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_names(directory: Path) -> list[str]:
    """Files below `directory` without the manifest and hidden files, as POSIX paths."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.as_posix() != MANIFEST and not any(part.startswith(".") for part in path.parts)
    )


def versions(artifacts_dir: Path, model: str) -> list[str]:
    """The versions of `model`, oldest first. A version is a whole number, so 10 follows 9."""
    if not (artifacts_dir / model).is_dir():
        return []
    found = (path.name for path in (artifacts_dir / model).iterdir() if path.is_dir())
    return sorted((name for name in found if name.isascii() and name.isdigit()), key=int)


def newest(artifacts_dir: Path, model: str) -> Artifact:
    """The version of `model` to serve. Its files are not checked yet: `Artifact.verify` does.

    Raises:
        StartupError: there is no version, or its manifest cannot be read.
    """
    found = versions(artifacts_dir, model)
    if not found:
        raise StartupError(
            f"{model}: there is no {artifacts_dir / model / '1'}/; make it with "
            f"python -m training.{model}, or from your own file: python -m app.publish {model} FILE"
        )
    directory = artifacts_dir / model / found[-1]
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StartupError(f"{model}: {path} is missing; {_REPUBLISH}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "JSON"
        raise StartupError(f"{model}: {path}: {where}: {fault['msg']}; {_REPUBLISH}") from None
    return Artifact(model, found[-1], directory, manifest)


@contextmanager
def new_version(
    artifacts_dir: Path,
    model: str,
    *,
    input_schema: Mapping[str, Any],
    trained_with: Iterable[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> Iterator[Path]:
    """A folder to write model files into, published as the next version when the block ends.

    Nothing is published when the block raises, and a service that starts meanwhile never
    sees half a version. `trained_with` names installed packages whose versions to record.
    """
    home = artifacts_dir / model
    home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
    try:
        yield draft
        packages = {name: installed_version(name) for name in trained_with}
        manifest = Manifest(
            files={name: sha256(draft / name) for name in file_names(draft)},
            created=datetime.now(UTC).replace(microsecond=0),
            trained_with={"python": sys.version.split()[0], **packages},
            metrics=dict(metrics or {}),
            input_schema=dict(input_schema),
        )
        (draft / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # A temporary folder is private to its owner; the service may run as another user.
        draft.chmod(0o755)
        _rename_to_next_version(draft, artifacts_dir, model)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename_to_next_version(draft: Path, artifacts_dir: Path, model: str) -> None:
    # Renaming onto a version that somebody else published meanwhile fails, as it is not empty.
    number = int((versions(artifacts_dir, model) or ["0"])[-1]) + 1
    while True:
        try:
            draft.rename(artifacts_dir / model / str(number))
        except OSError:
            if not (artifacts_dir / model / str(number)).exists():
                raise
            number += 1
        else:
            return
