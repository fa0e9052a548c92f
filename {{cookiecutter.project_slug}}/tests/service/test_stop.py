"""Stopping: what was accepted is answered, nothing comes after, and the end is reached in time."""

import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import httpx2 as httpx
import pytest

from tests.service.server import Service, Start


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=60)


def wait_until_refused(service: Service) -> None:
    deadline = monotonic() + 30
    while monotonic() < deadline:
        try:
            connect(service).close()
        except ConnectionRefusedError:
            return
    pytest.fail("connections are still accepted")


def test_a_request_under_way_is_answered_and_a_new_one_refused(start: Start, pipe: Path) -> None:
    service = start().wait_for("/ready")
    with ThreadPoolExecutor() as pool:
        request = pool.submit(service.predict, "gate", pipe=str(pipe), x=5)
        with pipe.open("w") as gate:
            # Open on both sides: the model is at work.
            service.signal(signal.SIGTERM)
            wait_until_refused(service)
            gate.write("go")
        answer = request.result()
    assert answer.json()["prediction"]["said"] == "go"
    assert answer.headers["connection"] == "close"
    assert service.exit_code() == 0
    assert service.log_lines("stopped"), "the lifespan was not ended"


def test_an_idle_connection_is_served_once_more_and_told_to_close(start: Start) -> None:
    service = start().wait_for("/ready")
    assert "connection" not in service.predict("double", x=1).headers
    service.signal(signal.SIGTERM)
    wait_until_refused(service)
    answer = service.client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["status"] == "draining"
    assert answer.headers["connection"] == "close"
    assert service.exit_code() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_ends_the_worker_as_well(start: Start, number: signal.Signals) -> None:
    service = start().wait_for("/ready")
    service.signal(number)
    assert service.exit_code() == 0
    assert service.log_lines("stopped"), "the worker was killed"


def send(client: httpx.Client, number: int) -> str:
    answer = client.post("/v1/predict", json={"features": {"x": number}})
    right = answer.status_code == 200 and answer.json()["prediction"]["y"] == 2 * number
    return "right" if right else f"wrong: {answer.text}"


@pytest.mark.parametrize("keep_alive", [True, False], ids=["keep-alive", "connection-each"])
@pytest.mark.parametrize("workers", [1, 2])
def test_under_load_every_request_is_answered(start: Start, workers: int, keep_alive: bool) -> None:
    service = start(WEB_CONCURRENCY=workers).wait_for("/ready")
    limits = httpx.Limits(max_keepalive_connections=1 if keep_alive else 0)
    outcomes: Counter[str] = Counter()
    warm = threading.Barrier(9)

    def send_until_refused() -> None:
        with httpx.Client(base_url=service.url, timeout=60, limits=limits) as client:
            for number in range(1_000_000):
                if number == 50:
                    warm.wait()
                try:
                    outcomes[send(client, number)] += 1
                except httpx.ConnectError:
                    return
                except httpx.TransportError as error:
                    outcomes[f"lost: {error!r}"] += 1
                    return

    threads = [threading.Thread(target=send_until_refused) for _ in range(8)]
    for thread in threads:
        thread.start()
    warm.wait()
    service.signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert outcomes.keys() == {"right"}, outcomes
    assert outcomes["right"] >= 8 * 50
    assert service.exit_code() == 0


def test_a_request_that_does_not_end_cannot_hold_up_the_stop(start: Start, pipe: Path) -> None:
    service = start(REQUEST_TIMEOUT_S=1, SHUTDOWN_GRACE_S=6).wait_for("/ready")
    with ThreadPoolExecutor() as pool:
        request = pool.submit(service.predict, "gate", pipe=str(pipe))
        with pipe.open("w"):
            service.signal(signal.SIGTERM)
            assert request.result().status_code == 504
            assert service.exit_code() == 0
    assert service.log_lines("stopped")
