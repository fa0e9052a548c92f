"""What the figures were measured on and with. No names of hosts or folders."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.environments import locked_versions
from benchmarks.sections import Bench

TOLD = [
    "fastapi",
    "gunicorn",
    "httptools",
    "numpy",
    "onnxruntime",
    "orjson",
    "pydantic",
    "scikit-learn",
    "starlette",
    "uvicorn",
    "uvloop",
]
"""Packages whose versions the report states."""


def describe(bench: Bench, template: Path) -> dict[str, Any]:
    cores = bench.cores
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": _packages(bench.contestants),
        "onnx": version("onnx"),
        "commit": commit(template),
        "pinned": "apart" if cores.are_apart else "one core for server and load",
    }


def in_words(contestants: Iterable[str]) -> str:
    """The machine, and the packages that `contestants` are made of."""
    packages = [f"{name} {version}" for name, version in _packages(contestants).items()]
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{_cpu()}, {os.cpu_count()} cores, {system}, {', '.join(packages)}"


def _packages(contestants: Iterable[str]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in contestants:
        versions |= locked_versions(name)
    return {name: versions[name] for name in TOLD if name in versions}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(repository: Path) -> str:
    """The commit, and whether there are changes to the template on top of it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "{{cookiecutter.project_slug}}")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", changed" if changed else "")
