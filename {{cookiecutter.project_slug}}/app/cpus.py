"""How many CPUs a process may use, which in a container are mostly fewer than the machine has."""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path


def usable_cpus() -> int:
    """CPUs of this process: its affinity, or the cgroup's quota where that is less; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, cgroup_quota()))


def tell_of_quota(environment: MutableMapping[str, str]) -> None:
    """Have what is loaded later compute on no more threads than a cgroup allows.

    PyTorch and OpenBLAS look at a process's affinity, and at no quota. Without a quota nothing is
    said: scikit-learn counts the physical cores then, which are better. Who has set OMP_NUM_THREADS
    knows best.
    """
    if cgroup_quota() <= usable_cpus() < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(usable_cpus()))


def cgroup_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    # cgroup v2: "max 100000" or "<quota> <period>", in microseconds.
    try:
        quota, period = path.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1
