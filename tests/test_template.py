"""The template as source: valid before rendering, in one direction, and no more than it says."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, TEMPLATE

SETTINGS = (TEMPLATE / "app" / "settings.py").read_text(encoding="utf-8")
PYTHON_FILES = sorted(TEMPLATE.rglob("*.py"))

LAYERS = [
    {"__main__", "worker", "serving", "publish", "train", "healthcheck"},
    {"main"},
    {"api"},
    {"lifecycle"},
    {"inference"},
    {"repository", "discovery"},
    {"cache", "drift"},
    {"shared_run", "passed_by"},
    {"flights"},
    {"batching", "runner", "tensor_parser"},
    {"protocol"},
    {"intake"},
    {"tensor", "redis_store", "onnx"},
    {
        "breaker",
        "canonical",
        "memory_store",
        "known_bodies",
        "token_bucket",
        "deadlines",
        "faults",
        "predictor",
        "reference",
        "artifacts",
        "cpus",
        "queues",
        "tickets",
        "waiting",
        "jobs",
        "metrics",
        "access_log",
        "logs",
        "structured",
        "traceparent",
        "tracing",
        "errors",
        "settings",
        "server_settings",
    },
]
"""From the top down: a module imports from its own layer and from those below it."""


@pytest.mark.parametrize(
    "path", PYTHON_FILES, ids=lambda path: path.relative_to(TEMPLATE).as_posix()
)
def test_every_python_file_is_valid_before_rendering(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    ast.parse(source)
    assert "cookiecutter" not in source


def imported_modules(path: Path) -> set[str]:
    """Of `app`, by the first name below it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name[:4] == "app."}
        elif isinstance(node, ast.ImportFrom) and node.module == "app":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("app."):
            found.add((node.module or "").split(".")[1])
    return found


def test_imports_go_one_way() -> None:
    depth = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in sorted((TEMPLATE / "app").rglob("*.py")):
        name = path.relative_to(TEMPLATE / "app").parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        for imported in imported_modules(path):
            assert depth[name] <= depth[imported], f"{path.name} imports app.{imported}"


def test_predictors_know_only_the_contract() -> None:
    for path in sorted((TEMPLATE / "predictors").glob("*.py")):
        assert imported_modules(path) <= {"predictor", "onnx", "tensor"}
        assert not re.search(r"\b(fastapi|asyncio|redis|http)\b", path.read_text(encoding="utf-8"))


def test_at_most_six_questions_with_prompts() -> None:
    context = json.loads((REPOSITORY / "cookiecutter.json").read_text(encoding="utf-8"))
    questions = [name for name in context if not name.startswith("_")]
    assert len(questions) <= 6
    assert context["__prompts__"].keys() == set(questions)


def test_hooks_need_only_the_standard_library() -> None:
    allowed = {"json", "keyword", "pathlib", "re", "shutil", "sys"}
    for path in (REPOSITORY / "hooks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= allowed
            if isinstance(node, ast.ImportFrom):
                assert node.module in allowed


def test_the_generated_readme_explains_every_setting() -> None:
    fields = re.findall(r"^    (\w+): .*\n    \"\"\"", SETTINGS, flags=re.MULTILINE)
    readme = (TEMPLATE / "README.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([A-Z0-9_]+)` \|", readme, flags=re.MULTILINE)
    assert len(fields) > 10
    assert set(documented) == {name.upper() for name in fields}


def test_workflows_parse() -> None:
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def test_links_between_documents_resolve() -> None:
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
