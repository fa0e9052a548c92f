"""Keeps the sample of the chosen kind, under the name of the model. Needs the stdlib alone."""

import json
import re
import shutil
from pathlib import Path

# As JSON in a raw string, in which `tojson` leaves no quote: answers are data, never code.
ANSWERS = json.loads(r'{{ cookiecutter | tojson }}')  # fmt: skip

SAMPLES = {"onnx": "fraud", "sklearn": "wine", "image": "digits"}
"""The name of each kind's sample in the template."""

SAMPLE_FILES = ["predictors/{}.py", "training/{}.py", "tests/test_{}.py"]

ONLY_FOR = {
    "app/onnx.py": {"onnx", "image"},
    "tests/service/test_onnx.py": {"onnx", "image"},
    "deploy/kubernetes/components/gpu": {"onnx", "image"},
    "deploy/kubernetes/overlays/production-gpu": {"onnx", "image"},
}
"""Files and folders that not every kind needs."""


def keep_sample(sample: str, model: str) -> None:
    """Drop the other samples, and call this one `model`, in its files as well."""
    other_samples = [name for name in SAMPLES.values() if name != sample]
    for pattern in SAMPLE_FILES:
        for name in other_samples:
            Path(pattern.format(name)).unlink(missing_ok=True)
        path = Path(pattern.format(sample))
        references = rf"\b(predictors|training)([./]){sample}\b"
        text = re.sub(references, rf"\1\2{model}", path.read_text(encoding="utf-8"))
        path.unlink()
        Path(pattern.format(model)).write_text(text, encoding="utf-8", newline="\n")


def keep_requirements(kind: str) -> None:
    """Move requirements/<kind>/* up, and drop the other kinds'."""
    for path in Path("requirements", kind).iterdir():
        path.replace(Path("requirements", path.name))
    for name in SAMPLES:
        shutil.rmtree(Path("requirements", name))


def drop_caches() -> None:
    """What tools have left in a template that is baked from a folder in use."""
    for pattern in ("__pycache__", ".*_cache", ".hypothesis"):
        for path in list(Path().rglob(pattern)):
            shutil.rmtree(path)


def drop_unneeded(kind: str) -> None:
    for path, kinds in ONLY_FOR.items():
        if kind not in kinds:
            remove(Path(path))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


if __name__ == "__main__":
    keep_sample(SAMPLES[ANSWERS["model_kind"]], ANSWERS["model_name"])
    keep_requirements(ANSWERS["model_kind"])
    drop_unneeded(ANSWERS["model_kind"])
    drop_caches()
    print(f"""
Your service is in {ANSWERS["project_slug"]}/. Next:

    cd {ANSWERS["project_slug"]}
    make run        # trains the sample model, then serves it on port 8080
    make test

Then make predictors/{ANSWERS["model_name"]}.py yours; README.md shows how.
""")
