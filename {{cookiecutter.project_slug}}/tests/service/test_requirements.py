"""What requirements/*.in ask for is what the locks hold."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.service.server import PROJECT

REQUIREMENTS = PROJECT / "requirements"


def requirements(path: Path) -> list[Requirement]:
    lines = (line.split(" \\")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "--"))]


@pytest.mark.parametrize(
    ("lock", "sources"),
    [
        ("service.lock", ["service.in", "model.in"]),
        ("dev.lock", ["service.in", "model.in", "train.in", "dev.in"]),
    ],
)
def test_locks_are_up_to_date(lock: str, sources: list[str]) -> None:
    if not (REQUIREMENTS / lock).exists():
        pytest.skip("not in a generated project: the template has a lock for each kind of model")
    locked = {entry.name: entry.specifier for entry in requirements(REQUIREMENTS / lock)}
    for source in sources:
        for wanted in requirements(REQUIREMENTS / source):
            [pinned] = locked.get(wanted.name, [None])
            fits = pinned and wanted.specifier.contains(pinned.version)
            assert fits, f"{source} asks for {wanted}, and {lock} has {pinned}; run: make lock"


@pytest.mark.parametrize("lock", sorted(REQUIREMENTS.rglob("*.lock"), key=str))
def test_every_package_is_locked_by_its_hash_alone(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    assert text.count("==") >= len(requirements(lock))
    assert "://" not in text
    for entry in text.split("\n\n"):
        assert "--hash=sha256:" in entry
