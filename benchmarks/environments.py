"""An environment of its own for each contestant, below build/bench/."""

import hashlib
import subprocess
import sys
from pathlib import Path

from benchmarks.contestants import SERVERS, Place, load

REPOSITORY = Path(__file__).parents[1]
BUILD = REPOSITORY / "build" / "bench"
MODELS = BUILD / "artifacts"


def make_place(name: str, template: Path) -> Place:
    """Install what the contestant's lock says, unless that is done, and let it prepare itself."""
    place = Place(BUILD / name, MODELS, template)
    lock = SERVERS / name / "requirements.lock"
    stamp = place.home / "installed"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != digest:
        _uv("venv", "--clear", "--python", sys.executable, str(place.home / "venv"))
        # Compiled now, or else the first cold start would be of another kind than the rest.
        options = ["--require-hashes", "--compile-bytecode", "--python", str(place.python)]
        _uv("pip", "sync", *options, str(lock))
        stamp.write_text(digest)
    load(name).prepare(place)
    return place


def _uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", "--quiet", *arguments], check=True)


def locked_versions(name: str) -> dict[str, str]:
    """What a contestant runs on, as its environment says."""
    output = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "list", "--quiet", "--format", "freeze",
         "--python", str(BUILD / name / "venv" / "bin" / "python")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines = (line.partition("==") for line in output.splitlines())
    return {name: version for name, _, version in lines}
