"""The service under load: one that is started here, as production starts it, or one that runs."""

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from app.settings import Settings
from loadtest.client import Target

START_S = 600
"""What Kubernetes is told to wait for models that load, see docs/deploy.md."""

PROBE_S = 5
ANSWER_S = 60
LOG_TAIL_BYTES = 64 * 1024


class LoadTestError(Exception):
    """There is nothing to measure. The message is one line that says why."""


@dataclass(frozen=True)
class Service:
    url: str
    key: str = ""
    """The API key to send; empty: none."""

    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None

    @property
    def target(self) -> Target:
        parts = urlsplit(self.url)
        is_tls = parts.scheme == "https"
        return Target(parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls)

    def request(self, model: str, body: bytes) -> bytes:
        """A request for a prediction, as it goes over the wire."""
        parts, headers = urlsplit(self.url), self._headers
        lines = [f"POST {parts.path}{path_of(model)} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body

    @property
    def _headers(self) -> dict[str, str]:
        # The cache is there to spare the model, and it is the model that is to be measured.
        headers = {"Content-Type": "application/json", "Cache-Control": "no-cache"}
        return headers | ({"X-API-Key": self.key} if self.key else {})

    def get(self, path: str) -> str:
        """The body of an answer with 200.

        Raises:
            OSError, HTTPException: there was none.
        """
        with urlopen(self.url + path, timeout=PROBE_S) as answer:  # noqa: S310
            content: bytes = answer.read()
            return content.decode()

    def status(self, model: str, body: bytes) -> int:
        """The status of the answer to one request.

        Raises:
            LoadTestError: there was none.
        """
        request = Request(self.url + path_of(model), body, self._headers)  # noqa: S310
        try:
            with urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310
                status: int = answer.status
                return status
        except HTTPError as error:
            return error.code
        except (OSError, HTTPException) as error:
            raise LoadTestError(f"{self.url} does not answer: {_reason(error)}") from None

    def wait_until_ready(self) -> None:
        """Or, where it was not started here, see that it is.

        Raises:
            LoadTestError: it does not get ready, or has ended.
        """
        deadline = monotonic() + START_S
        while True:
            try:
                self.get("/ready")
            except (OSError, HTTPException, ValueError) as error:
                if self.process and self.process.poll() is not None:
                    raise LoadTestError(f"The service did not start: {self._last_words}") from None
                if self.process is None or monotonic() > deadline:
                    raise LoadTestError(f"{self.url}/ready: {_reason(error)}") from None
                sleep(0.05)
            else:
                return

    def check(self) -> None:
        """To be called between steps.

        Raises:
            LoadTestError: the service has ended.
        """
        if self.process and self.process.poll() is not None:
            raise LoadTestError(f"The service has ended: {self._last_words}")
        if self.log:
            # It writes a line for each request, which would pile up.
            os.ftruncate(self.log.fileno(), 0)

    @property
    def _last_words(self) -> str:
        """The most serious of the last lines of its log."""
        assert self.log  # noqa: S101
        self.log.seek(max(0, os.fstat(self.log.fileno()).st_size - LOG_TAIL_BYTES))
        lines = self.log.read().decode(errors="replace").split("\n")
        lines = [line for line in lines if line.strip()] or ["it said nothing"]
        for line in reversed(lines):
            if '"level": "critical"' in line:
                return str(json.loads(line)["event"])
        return lines[-1][:500]


def path_of(model: str) -> str:
    return f"/v1/models/{model}/predict"


@contextmanager
def started(settings: Settings) -> Iterator[Service]:
    """A service with one worker, on a free port of this machine, until the block ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"PORT": port, "AIP_HTTP_PORT": port, "BIND_ADDRESS": "127.0.0.1"}
    environment |= {"WEB_CONCURRENCY": "1", "LOG_FORMAT": "json"}
    key = secrets.token_urlsafe() if settings.api_keys_sha256 else ""
    if key:
        environment["API_KEYS_SHA256"] = hashlib.sha256(key.encode()).hexdigest()
    # Written to its end, wherever that is.
    with TemporaryFile("a+b") as log:
        # In a session of its own, so that Ctrl-C is for us alone.
        process = subprocess.Popen(
            [sys.executable, "-m", "app"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield Service(f"http://127.0.0.1:{port}", key, process, log)
        finally:
            _stop(process, settings.shutdown_grace_s)


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # After another Ctrl-C, too.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"status {error.code}"
    return str(error.reason if isinstance(error, URLError) else error) or type(error).__name__
