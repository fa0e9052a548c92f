"""`make demo`, as a newcomer runs it: in a fresh copy, until Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.conftest import ENVIRONMENT
from tests.test_baked_projects import free_port


@pytest.fixture
def environment() -> dict[str, str]:
    return {name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTHON")}


def test_it_shows_a_real_answer_and_stops_on_ctrl_c(
    template: Path, environment: dict[str, str]
) -> None:
    port = free_port()
    demo = subprocess.Popen(
        ["make", "demo", f"PORT={port}"],
        cwd=template,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout
    with demo:
        printed = ""
        for line in demo.stdout:
            printed += line
            if "Ctrl-C stops it" in line:
                break
        try:
            assert f"curl http://localhost:{port}/v1/predict" in printed, printed
            assert '"fraud_probability": 0.9' in printed
            assert re.search(r"Cache +miss, [\d.]+ ms; asked again: hit, [\d.]+ ms", printed)
            assert f"http://localhost:{port}/docs" in printed
            assert re.search(rf"Status +http://localhost:{port}/ ", printed)
            with urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert b"Try a prediction" in answer.read()
            with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                assert b"http_requests_total" in answer.read()
        finally:
            # To the whole group, as a terminal does.
            os.killpg(demo.pid, signal.SIGINT)
            rest = demo.stdout.read()
    assert "Stopped." in rest
    assert "Traceback" not in rest
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{port}/health")
    assert (template / "build" / "fraud-detection" / "predictors" / "fraud.py").exists()


def test_a_port_in_use_is_told_at_once(template: Path, environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            ["make", "demo", f"PORT={port}"],
            cwd=template,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode != 0
    assert f"Port {port} is in use. Choose another: make demo PORT={port + 1}" in result.stdout
