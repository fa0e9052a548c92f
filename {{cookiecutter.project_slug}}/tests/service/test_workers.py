"""Several workers, and workers that are replaced: the service does not notice."""

import json
import os
import signal
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.service.server import (
    FAKES,
    WAIT_S,
    Service,
    Start,
    make_certificate,
    publish,
    worker_pids,
)

SOURCE = (FAKES / "double.py").read_text(encoding="utf-8")


def assert_answers(service: Service, requests: int = 50) -> None:
    """On a connection each, so that every worker that listens gets some."""
    for _ in range(requests):
        answer = service.post_alone("/v1/predict", {"features": {"x": 1}})
        assert answer.status_code == 200
        assert answer.json()["prediction"] == {"y": 2}


def times_loaded(service: Service) -> int:
    """How many workers have loaded the default model."""
    return sum(line["model"] == "double" for line in service.log_lines("model ready"))


@pytest.fixture
def start_slow(start: Start, tmp_path: Path, pipe: Path) -> Callable[..., Service]:
    """Starts a service whose workers, once there is a file `slow`, load when `pipe` is written."""
    slow = f"Path({str(tmp_path / 'slow')!r}).exists() and Path({str(pipe)!r}).read_text()"
    folder = tmp_path / "predictors"
    folder.mkdir()
    source = SOURCE.replace("self.factor = ", f"{slow}; self.factor = ")
    (folder / "double.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "double", factor_txt=b"2")

    def start_slow(**settings: object) -> Service:
        return start(PREDICTORS_DIR=folder, ARTIFACTS_DIR=tmp_path, **settings).wait_for("/ready")

    return start_slow


def test_the_metrics_are_those_of_all(start: Start) -> None:
    service = start(WEB_CONCURRENCY=2).wait_for("/ready")
    assert_answers(service, requests=20)
    counted = 'http_requests_total{handler="/v1/predict",method="POST",status="200"} 20.0'
    assert counted in service.client.get("/metrics").text


def test_counters_go_on_when_workers_are_replaced_and_files_do_not_pile_up(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    service = start(WEB_CONCURRENCY=2, TMPDIR=folder).wait_for("/ready")
    counted = 'http_requests_total{handler="/v1/predict",method="POST",status="200"} %d.0'
    waiting = 'inference_queue_depth{model="double",version="1"} 0.0'
    for times in range(1, 5):
        assert_answers(service, requests=20)
        metrics = service.client.get("/metrics").text
        assert counted % (20 * times) in metrics
        assert waiting in metrics
        places = {path.stem.rpartition("_")[2] for path in folder.glob("metrics-*/*.db")}
        assert places == {"0", "1"}
        os.kill(worker_pids(service)[-1], signal.SIGKILL)
        service.wait_until(lambda: times_loaded(service) == 2 + times)  # noqa: B023
        # Who was connected to the worker that is gone connects anew.
        service.client.close()
        service.client = httpx.Client(base_url=service.url)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_ends_is_replaced_and_answers_nothing_before_it_has_loaded(
    start_slow: Callable[..., Service], tmp_path: Path, pipe: Path, number: signal.Signals
) -> None:
    service = start_slow(WEB_CONCURRENCY=2)
    (tmp_path / "slow").touch()
    first, second = worker_pids(service)
    os.kill(first, number)
    # Opens when the replacement is loading.
    with pipe.open("w"):
        assert_answers(service)
    service.wait_until(lambda: len(service.log_lines("model ready")) == 3)
    os.kill(second, signal.SIGKILL)
    # Only the replacement is left to answer.
    with pipe.open("w"):
        assert_answers(service)


def test_a_replacement_that_cannot_load_leaves_the_others_alone(
    start_slow: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_slow(WEB_CONCURRENCY=2)
    (tmp_path / "double" / "1" / "factor.txt").write_text("3")
    os.kill(worker_pids(service)[0], signal.SIGKILL)
    service.wait_until(
        lambda: [line for line in service.log_lines() if line["level"] == "critical"]
    )
    assert_answers(service)
    assert service.process.poll() is None


def test_a_reload_brings_new_workers_and_loses_nothing(start: Start, pipe: Path) -> None:
    service = start().wait_for("/ready")
    with ThreadPoolExecutor() as pool:
        request = pool.submit(service.predict, "gate", pipe=f"{pipe}", x=5)
        with pipe.open("w") as gate:
            # Open on both sides: the model is at work.
            service.signal(signal.SIGHUP)
            service.wait_until(lambda: times_loaded(service) == 2)
            assert_answers(service, requests=10)
            gate.write("go")
        assert request.result().json()["prediction"]["said"] == "go"
    service.wait_until(lambda: service.log_lines("stopped"))
    assert_answers(service, requests=10)
    assert len(worker_pids(service)) == 2


def test_a_reload_that_could_not_start_changes_nothing(
    start_slow: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_slow(WEB_CONCURRENCY=2)
    before = worker_pids(service)
    broken = tmp_path / "predictors" / "double.py"
    broken.write_text("import nothing_of_that_name", encoding="utf-8")
    service.signal(signal.SIGHUP)
    service.wait_until(lambda: "Not reloaded" in service.log)
    [line] = [line for line in service.log_lines() if "Not reloaded" in line["event"]]
    assert line["level"] == "error"
    assert "nothing_of_that_name" in line["event"]
    assert worker_pids(service) == before
    assert_answers(service)


def test_another_gunicorn_goes_on_with_the_socket(start: Start) -> None:
    service = start().wait_for("/ready")
    service.signal(signal.SIGUSR2)
    service.wait_until(lambda: times_loaded(service) == 2)
    [_, listening] = [
        line["event"] for line in service.log_lines() if "Listening at" in line["event"]
    ]
    other = int(listening.rpartition("(")[2].rstrip(")"))
    try:
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert_answers(service, requests=10)
    finally:
        os.kill(other, signal.SIGTERM)
    service.wait_until(lambda: not Path(f"/proc/{other}").exists())


def test_an_empty_number_of_workers_is_one(start: Start) -> None:
    assert_answers(start(WEB_CONCURRENCY="").wait_for("/ready"), requests=1)


def test_gunicorn_has_not_imported_what_workers_need(start: Start) -> None:
    service = start().wait_for("/ready")
    [worker] = worker_pids(service)
    imported = [Path(f"/proc/{pid}/maps").read_text() for pid in (worker, service.process.pid)]
    assert ["pydantic_core" in files for files in imported] == [True, False]


def test_gunicorn_s_options_for_tls_hold(start: Start, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    options = f"--certfile={certificate} --keyfile={key}"
    service = start(GUNICORN_CMD_ARGS=options)
    service.wait_until(lambda: times_loaded(service))
    trust = ssl.create_default_context(cafile=certificate)
    with httpx.Client(base_url=service.url.replace("http", "https"), verify=trust) as client:
        answer = client.post("/v1/predict", json={"features": {"x": 1}})
    assert answer.json()["prediction"] == {"y": 2}


def test_workers_do_not_outlive_gunicorn(start: Start) -> None:
    service = start(WEB_CONCURRENCY=2).wait_for("/ready")
    workers = worker_pids(service)
    assert len(workers) == 2
    service.signal(signal.SIGKILL)
    service.exit_code()
    service.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert len(service.log_lines("stopped")) == 2


def test_those_who_connect_at_once_share_a_batch(start: Start) -> None:
    service = start().wait_for("/ready")
    [worker] = worker_pids(service)
    connections = []
    # They are all there before it looks.
    os.kill(worker, signal.SIGSTOP)
    try:
        for number in range(16):
            body = json.dumps({"features": {"x": number}})
            head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: at-once-{number}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connections.append(socket.create_connection(("127.0.0.1", service.port), WAIT_S))
            connections[-1].sendall((head + body).encode())
    finally:
        os.kill(worker, signal.SIGCONT)
    for connection in connections:
        with connection:
            assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")
    service.wait_until(lambda: service.log_lines_of("at-once-15", "request"))
    [first] = service.log_lines_of("at-once-0", "request")
    assert first["batch_rows"] > 1
