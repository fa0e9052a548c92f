"""Artifacts: versions appear whole or not at all, and are told apart by their digests."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.artifacts import Manifest, new_version, newest, sha256, versions
from app.errors import StartupError
from tests.service.server import FAKES, PROJECT, publish


def test_versions_are_numbered_on_and_sorted_as_numbers(tmp_path: Path) -> None:
    for _ in range(11):
        publish(tmp_path, "m", model_bin=b"x")
    assert versions(tmp_path, "m") == [str(number) for number in range(1, 12)]
    assert newest(tmp_path, "m").version == "11"


def test_other_folders_are_no_versions(tmp_path: Path) -> None:
    publish(tmp_path, "m", model_bin=b"x")
    for name in ("v2", ".draft-1", "³", "latest"):
        (tmp_path / "m" / name).mkdir()
    assert versions(tmp_path, "m") == ["1"]
    assert versions(tmp_path, "unknown") == []


def test_a_manifest_says_what_and_from_what(tmp_path: Path) -> None:
    schema: dict[str, Any] = {"properties": {"x": {}}}
    with new_version(
        tmp_path, "m", input_schema=schema, trained_with=["pydantic"], metrics={"auc": 0.9}
    ) as directory:
        (directory / "tokens").mkdir()
        (directory / "tokens" / "vocabulary.txt").write_bytes(b"a b")
        (directory / "model.bin").write_bytes(b"x")
    artifact = newest(tmp_path, "m")
    artifact.verify()
    manifest = artifact.manifest
    assert manifest.files == {
        "model.bin": sha256(artifact.directory / "model.bin"),
        "tokens/vocabulary.txt": sha256(artifact.directory / "tokens" / "vocabulary.txt"),
    }
    assert manifest.trained_with.keys() == {"python", "pydantic"}
    assert manifest.metrics == {"auc": 0.9}
    assert manifest.input_schema == schema
    assert manifest.created.tzinfo is not None


def fail_halfway(artifacts_dir: Path) -> None:
    with new_version(artifacts_dir, "m", input_schema={}) as directory:
        (directory / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt


def test_a_training_that_fails_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(tmp_path)
    assert list((tmp_path / "m").iterdir()) == []


def test_an_empty_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="files"):
        publish(tmp_path, "m")
    assert versions(tmp_path, "m") == []


def test_the_digest_is_that_of_names_and_contents(tmp_path: Path) -> None:
    def digest(**files: bytes) -> str:
        publish(tmp_path, "m", **files)
        return newest(tmp_path, "m").digest

    assert digest(a_bin=b"1", b_bin=b"2") == digest(b_bin=b"2", a_bin=b"1")
    different = [digest(a_bin=b"1"), digest(b_bin=b"1"), digest(a_bin=b"2"), digest(a_bin=b"12")]
    assert len(set(different)) == 4


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.bin", "a/../../b"])
def test_a_manifest_cannot_point_outside(name: str) -> None:
    with pytest.raises(ValidationError, match="points outside"):
        Manifest.model_validate({"files": {name: "0"}, "created": "2026-01-01T00:00:00Z"})


class TestPublish:
    """`python -m app.publish`, for a model file that is already there."""

    @staticmethod
    def run(artifacts_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.publish", *arguments],
            cwd=PROJECT,
            env={"ARTIFACTS_DIR": str(artifacts_dir), "PREDICTORS_DIR": str(FAKES)},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_it_becomes_the_next_version(self, tmp_path: Path) -> None:
        (tmp_path / "factor.txt").write_text("3")
        result = self.run(tmp_path, "double", str(tmp_path / "factor.txt"))
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"Published {tmp_path}/double/1/\n"
        artifact = newest(tmp_path, "double")
        artifact.verify()
        assert artifact.manifest.files.keys() == {"factor.txt"}
        assert artifact.manifest.input_schema["properties"].keys() == {"x", "note", "class"}

    def test_what_cannot_be_published_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "factor.txt").write_text("3")
        unknown = self.run(tmp_path, "triple", str(tmp_path / "factor.txt"))
        assert unknown.returncode == 2
        assert f"no {FAKES}/triple.py; write it first" in unknown.stderr
        twice = self.run(tmp_path, "double", *[str(tmp_path / "factor.txt")] * 2)
        assert twice.returncode == 2
        assert "different names" in twice.stderr
        missing = self.run(tmp_path, "double", str(tmp_path / "nothing.txt"))
        assert missing.returncode == 2
        assert "nothing.txt is not a file" in missing.stderr


def test_a_missing_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"python -m training\.m, or from your own file"):
        newest(tmp_path, "m")
