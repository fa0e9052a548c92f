"""A real server process, started as production starts it, for the tests to ask and to stop."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx2 as httpx

from app.artifacts import new_version

PROJECT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "predictors"
WAIT_S = 60

Start = Callable[..., "Service"]


class Service:
    """A server process, its address and its log."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log
        # What the developer has set for their own service must not reach the one under test.
        own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        fixed = {
            "PORT": str(self.port),
            "BIND_ADDRESS": "127.0.0.1",
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
        }
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app"],
                cwd=PROJECT,
                env=own | fixed | environment,
                stdout=stderr,
                stderr=stderr,
            )
        self.client = httpx.Client(base_url=self.url, timeout=WAIT_S)

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def log_lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of the log; with `event`, those that say so."""
        lines = [json.loads(line) for line in self.log.splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    def log_lines_of(self, request_id: str, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log_lines(event) if line["request_id"] == request_id]

    def wait_for(self, path: str, status: int = 200) -> "Service":
        """Until `path` answers with `status`; fails at once when the process ends."""
        deadline = monotonic() + WAIT_S
        while True:
            assert self.process.poll() is None, f"the service has ended:\n{self.log}"
            try:
                if self.client.get(path).status_code == status:
                    return self
            except httpx.TransportError:
                pass
            assert monotonic() < deadline, f"{path} is not {status}:\n{self.log}"
            sleep(0.02)

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = monotonic() + WAIT_S
        while not condition():
            assert monotonic() < deadline, self.log
            sleep(0.02)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(WAIT_S)

    def post_alone(self, path: str, body: Any) -> httpx.Response:
        """POST on a connection of its own."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=WAIT_S)

    def predict(self, model: str, **features: Any) -> httpx.Response:
        return self.client.post(f"/v1/models/{model}/predict", json={"features": features})

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *subject, *files], check=True, capture_output=True)
    return certificate, key


def publish(artifacts_dir: Path, model: str, **files: bytes) -> Path:
    """The folder of a new version with `files`, whose names have `_` for the dot."""
    with new_version(artifacts_dir, model, input_schema={}) as directory:
        for name, content in files.items():
            (directory / name.replace("_", ".")).write_bytes(content)
    return max(artifacts_dir.joinpath(model).iterdir(), key=lambda path: int(path.name))


def assert_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of `answer`, which is one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


def worker_pids(service: Service) -> list[int]:
    """Of all workers that were ever started, in this order."""
    events = [line["event"] for line in service.log_lines()]
    return [int(event.rsplit(" ", 1)[1]) for event in events if "Booting worker" in event]
