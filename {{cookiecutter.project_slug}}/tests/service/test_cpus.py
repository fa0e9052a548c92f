"""How many CPUs a model may compute on."""

import os
import runpy
from pathlib import Path

import pytest

from app import cpus
from tests.service.server import PROJECT


@pytest.mark.parametrize(
    ("content", "expected"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", os.cpu_count()), ("", None)],
)
def test_a_quota_of_the_cgroup_counts(tmp_path: Path, content: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    quota = cpus.cgroup_quota(tmp_path / "cpu.max")
    assert quota == (expected or os.cpu_count())
    assert cpus.cgroup_quota(tmp_path / "nothing") == os.cpu_count()


@pytest.mark.parametrize(
    ("given", "quota", "expected"),
    [({}, 1, {"OMP_NUM_THREADS": "1"}), ({}, 64, {}), ({"OMP_NUM_THREADS": "7"}, 1, None)],
)
def test_what_computes_with_openmp_is_told_of_a_quota(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    quota: int,
    expected: dict[str, str] | None,
) -> None:
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    environment = dict(given)
    cpus.tell_of_quota(environment)
    assert environment == (given if expected is None else expected)


def test_workers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(cpus, "tell_of_quota", told.append)
    runpy.run_path(str(PROJECT / "gunicorn.conf.py"))
    assert told == [os.environ]
