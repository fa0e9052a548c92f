"""Batches as callers and operators see them: deadlines, priorities, hang-ups, shapes, metrics."""

import hashlib
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from app.repository import what_prevents_batches
from app.settings import Settings
from tests.service.server import FAKES, Service, Start, assert_problem, publish

GATE = "/v1/models/gate/predict"


def sample(service: Service, name: str, **labels: str) -> float:
    """The value of a metric."""
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    series = name + "{" + inner + "}" if labels else name
    text = service.client.get("/metrics").text
    found = re.search("^" + re.escape(series) + r" (\S+)$", text, flags=re.MULTILINE)
    return float(found[1]) if found else 0.0


def post_gate(service: Service, pipe: str, **headers: str) -> httpx.Response:
    body = {"features": {"pipe": pipe}}
    return httpx.post(f"{service.url}{GATE}", json=body, headers=headers, timeout=60)


class TestDeadline:
    def test_a_caller_may_shorten_it(self, service: Service, pipe: Path) -> None:
        with ThreadPoolExecutor() as pool:
            held = pool.submit(post_gate, service, str(pipe))
            with pipe.open("w"):
                answer = post_gate(service, "/dev/null", **{"X-Request-Timeout-Ms": "50"})
                assert_problem(answer, 504)
        assert held.result().status_code == 200

    def test_but_not_lengthen_it(self, start: Start, pipe: Path) -> None:
        service = start(REQUEST_TIMEOUT_S=1).wait_for("/ready")
        with ThreadPoolExecutor() as pool:
            headers = {"X-Request-Timeout-Ms": "60000"}
            held = pool.submit(post_gate, service, str(pipe), **headers)
            with pipe.open("w"):
                assert_problem(held.result(), 504)

    @pytest.mark.parametrize("given", ["soon", "-1", "0", "1.5", "1e3", "", "9" * 20])
    def test_nonsense_is_named(self, service: Service, given: str) -> None:
        problem = assert_problem(
            post_gate(service, "/dev/null", **{"X-Request-Timeout-Ms": given}), 422
        )
        assert problem["errors"][0]["field"] == "X-Request-Timeout-Ms"
        if given:
            assert given not in problem["errors"][0]["message"]


def queue_is(service: Service, rows: int) -> bool:
    return sample(service, "inference_queue_depth", model="gate", version="1") == rows


def test_the_urgent_go_first(start: Start, pipe: Path) -> None:
    service = start(BATCH_MAX_ROWS=1).wait_for("/ready")
    # By RFC 9218: the default is u=3, and what makes no sense counts as that.
    priorities = ["u=7", "u=9, i", "u=1;a", "i, u=0", "u=3"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post_gate, service, str(pipe))
        with pipe.open("w"):
            others = []
            for waiting, priority in enumerate(priorities, 1):
                headers = {"Priority": priority}
                others.append(pool.submit(post_gate, service, "/dev/null", **headers))
                service.wait_until(partial(queue_is, service, waiting))
        numbers = [answer.result().json()["prediction"]["number"] for answer in others]
    begin = first.result().json()["prediction"]["number"]
    assert [number - begin for number in numbers] == [5, 3, 2, 1, 4]


@pytest.mark.parametrize(
    ("requests", "target"),
    [(1, GATE), (2, GATE), (1, f"{GATE}?code=1"), (1, GATE.replace("d", "%64"))],
    ids=["alone", "pipelined", "with a query", "by way of ASGI"],
)
def test_what_a_caller_hung_up_on_never_reaches_the_model(
    service: Service, pipe: Path, tmp_path: Path, requests: int, target: str
) -> None:
    def cancelled() -> float:
        labels = {"model": "gate", "version": "1", "outcome": "cancelled"}
        return sample(service, "inference_requests_total", **labels)

    before, failures = cancelled(), len(service.log_lines("prediction failed"))
    request_id = f"hung-up-{requests}-{len(target)}"
    with ThreadPoolExecutor() as pool:
        held = pool.submit(post_gate, service, str(pipe))
        with pipe.open("w"):
            body = json.dumps({"features": {"pipe": str(tmp_path / "missing")}}).encode()
            head = (
                f"POST {target} HTTP/1.1\r\nHost: x\r\nX-Request-ID: {request_id}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(requests * (head + body))
                service.wait_until(partial(queue_is, service, 1))
            service.wait_until(lambda: service.log_lines_of(request_id, "request"))
            assert service.log_lines_of(request_id, "request")[0]["status"] == 499
        assert held.result().status_code == 200
    assert queue_is(service, 0)
    # Had it reached the model, that would have failed for want of the file.
    assert post_gate(service, "/dev/null").status_code == 200
    assert len(service.log_lines("prediction failed")) == failures
    assert cancelled() == before + 1


def test_only_rows_of_one_shape_share_a_batch(start: Start, tmp_path: Path) -> None:
    source = (FAKES / "double.py").read_text(encoding="utf-8")
    source = source.replace(
        "    def predict(",
        """    def shape_key(self, row: Features) -> int:
        return len(row.note)

    def predict(""",
    ).replace(
        "        return [",
        "        assert len({len(row.note) for row in batch}) == 1\n        return [",
    )
    (tmp_path / "double.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "double", factor_txt=b"2")
    service = start(PREDICTORS_DIR=tmp_path, ARTIFACTS_DIR=tmp_path).wait_for("/ready")
    rows = [{"x": number, "note": "n" * (number % 3)} for number in range(10)]
    answer = service.client.post("/v1/predict/batch", json={"instances": rows})
    assert [row["y"] for row in answer.json()["predictions"]] == [2 * n for n in range(10)]
    assert sample(service, "inference_batch_size_sum", model="double", version="1") >= 10
    assert not service.log_lines("prediction failed")


@pytest.mark.parametrize("shape", ["1 / row.x", "[row.x]"], ids=["raises", "cannot be a key"])
def test_a_row_without_a_shape_fails_alone(start: Start, tmp_path: Path, shape: str) -> None:
    source = (FAKES / "double.py").read_text(encoding="utf-8")
    source = source.replace(
        "    def predict(",
        f"""    def shape_key(self, row: Features) -> object:
        return {shape} if row.x == 0 else None

    def predict(""",
    )
    (tmp_path / "double.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "double", factor_txt=b"2")
    service = start(PREDICTORS_DIR=tmp_path, ARTIFACTS_DIR=tmp_path).wait_for("/ready")
    assert_problem(service.predict("double", x=0), 500)
    assert service.predict("double", x=1).json()["prediction"] == {"y": 2}
    assert len(service.log_lines("prediction failed")) == 1


def test_sizes_that_are_allowed_are_all_run_at_the_start_and_no_others(
    start: Start, tmp_path: Path
) -> None:
    source = (FAKES / "double.py").read_text(encoding="utf-8")
    source = source.replace(
        "    def predict(",
        "    allowed_batch_sizes = (2, 4, 6)\n    sizes: set[int] = set()\n\n    def predict(",
    ).replace(
        "        return [",
        """        self.sizes.add(len(batch))
        assert len(batch) in self.allowed_batch_sizes
        if any(row.note == "sizes" for row in batch):
            return [Prediction(y=float("".join(map(str, sorted(self.sizes))))) for _ in batch]
        return [""",
    )
    (tmp_path / "double.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "double", factor_txt=b"2")
    service = start(PREDICTORS_DIR=tmp_path, ARTIFACTS_DIR=tmp_path).wait_for("/ready")
    assert service.predict("double", x=1, note="sizes").json()["prediction"]["y"] == 246
    for count in range(1, 20):
        rows = [{"x": number} for number in range(count)]
        answer = service.client.post("/v1/predict/batch", json={"instances": rows})
        assert [row["y"] for row in answer.json()["predictions"]] == [2 * n for n in range(count)]


def test_a_lost_device_is_told_and_the_process_is_replaced(start: Start, tmp_path: Path) -> None:
    source = (FAKES / "faulty.py").read_text(encoding="utf-8")
    lost = 'RuntimeError("CUDA error: an illegal memory access was encountered")'
    source = source.replace('int("the password is swordfish")', f"(_ for _ in ()).throw({lost})")
    source = source.replace("        pass\n", '        self.provider = "cuda"\n')
    (tmp_path / "faulty.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "faulty", none=b"")
    service = start(
        PREDICTORS_DIR=tmp_path, ARTIFACTS_DIR=tmp_path, DEFAULT_MODEL="faulty"
    ).wait_for("/ready")
    assert_problem(service.predict("faulty", fault="raise"), 503)
    service.wait_until(lambda: len(service.log_lines("model ready")) == 2)
    assert service.wait_for("/ready").post_alone(
        "/v1/predict", {"features": {"fault": "none"}}
    ).json()["prediction"] == {"y": 1}
    [line] = [line for line in service.log_lines() if line["level"] == "critical"]
    assert "faulty" in line["event"]


def test_batches_are_measured(start: Start) -> None:
    # Not /ready, which asks the models, too.
    service = start().wait_for("/startup")
    rows: list[dict[str, Any]] = [{"x": number} for number in range(40)]
    assert service.client.post("/v1/predict/batch", json={"instances": rows}).status_code == 200
    faults = [{"fault": "item"}]
    service.client.post("/v1/models/faulty/predict/batch", json={"instances": faults})
    service.predict("faulty", fault="raise")
    labels = {"model": "double", "version": "1"}
    assert sample(service, "inference_requests_total", **labels, outcome="ok") == 1
    assert sample(service, "inference_batch_size_sum", **labels) == 40
    assert sample(service, "inference_batch_size_count", **labels) == 2
    assert sample(service, "inference_compute_seconds_count", **labels) == 2
    assert sample(service, "inference_queue_wait_seconds_count", **labels) == 1
    assert sample(service, "inference_batch_max_rows", **labels) == 32
    labels["model"] = "faulty"
    assert sample(service, "inference_requests_total", **labels, outcome="invalid") == 1
    assert sample(service, "inference_requests_total", **labels, outcome="failed") == 1


def test_a_predictor_has_limits_of_its_own(start: Start, tmp_path: Path, pipe: Path) -> None:
    source = (FAKES / "gate.py").read_text(encoding="utf-8")
    limits = "    batch_max_rows = 2\n    queue_max_rows = 3\n"
    source = source.replace("    cache = False\n", f"    cache = False\n{limits}")
    (tmp_path / "gate.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "gate", none=b"")
    places = {"PREDICTORS_DIR": tmp_path, "ARTIFACTS_DIR": tmp_path}
    service = start(**places, DEFAULT_MODEL="gate", MAX_INSTANCES=3).wait_for("/ready")
    labels = {"model": "gate", "version": "1"}
    assert sample(service, "inference_batch_max_rows", **labels) == 2
    rows = [{"pipe": "/dev/null"} for _ in range(3)]
    three = partial(httpx.post, f"{service.url}{GATE}/batch", json={"instances": rows}, timeout=60)
    before = sample(service, "inference_batch_size_count", **labels)
    with ThreadPoolExecutor() as pool:
        held = pool.submit(post_gate, service, str(pipe))
        with pipe.open("w"):
            queued = pool.submit(three)
            service.wait_until(partial(queue_is, service, 3))
            assert_problem(post_gate(service, "/dev/null"), 429)
        assert held.result().status_code == queued.result().status_code == 200
    # One, two, and one.
    assert sample(service, "inference_batch_size_count", **labels) == before + 3


def test_a_queue_of_a_predictor_that_is_too_short_is_told_at_the_start(
    start: Start, tmp_path: Path
) -> None:
    source = (FAKES / "double.py").read_text(encoding="utf-8")
    source = source.replace("    def load(", "    queue_max_rows = 8\n\n    def load(")
    (tmp_path / "double.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "double", factor_txt=b"2")
    service = start(PREDICTORS_DIR=tmp_path, ARTIFACTS_DIR=tmp_path, MAX_INSTANCES=9)
    assert service.exit_code() != 0
    [line] = [line["event"] for line in service.log_lines() if line["level"] == "critical"]
    assert line.startswith("double: queue_max_rows = 8 is less than MAX_INSTANCES=9")


def test_who_is_too_late_is_counted(start: Start, pipe: Path) -> None:
    service = start(REQUEST_TIMEOUT_S=1).wait_for("/ready")
    with ThreadPoolExecutor() as pool:
        late = pool.submit(post_gate, service, str(pipe))
        with pipe.open("w"):
            assert_problem(late.result(), 504)
    labels = {"model": "gate", "version": "1"}
    assert sample(service, "inference_requests_total", **labels, outcome="expired") == 1


def test_fewer_files_than_a_batch_has_rows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.repository.resource.getrlimit", lambda _: (20, 20))
    [line] = what_prevents_batches(Settings(default_model="double"), 32, 10_000)
    assert line.startswith("only 20 files can be open")


def test_settings_that_prevent_batches_are_named_at_the_start(start: Start) -> None:
    service = start(
        QUEUE_MAX_ROWS=8,
        MAX_INSTANCES=8,
        BATCH_POLICY="window",
        BATCH_MAX_WAIT_MS=5000,
        REQUEST_TIMEOUT_S=5,
    ).wait_for("/startup")
    warnings = [line["event"] for line in service.log_lines() if line["level"] == "warning"]
    assert [line for line in warnings if line.startswith("double: a queue of 8 rows ")]
    assert [line for line in warnings if line.startswith("double: BATCH_MAX_WAIT_MS=5000 ")]
    usual = start().wait_for("/startup")
    assert not [line for line in usual.log_lines() if line["level"] == "warning"]


def test_overload_is_told_to_those_with_a_key_and_to_a_whole_pipeline(
    start: Start, pipe: Path
) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    service = start(QUEUE_MAX_ROWS=1, MAX_INSTANCES=1, API_KEYS_SHA256=digest).wait_for("/ready")
    key = {"X-API-Key": "secret"}
    body = b'{"features": {"pipe": "/dev/null"}}'
    head = f"POST {GATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"X-API-Key: secret\r\nContent-Length: {len(body)}\r\n"
    with ThreadPoolExecutor() as pool:
        held = pool.submit(post_gate, service, str(pipe), **key)
        with pipe.open("w"):
            queued = pool.submit(post_gate, service, "/dev/null", **key)
            service.wait_until(partial(queue_is, service, 1))
            assert_problem(post_gate(service, "/dev/null"), 401)
            refused = post_gate(service, "/dev/null", **key, **{"X-Request-ID": "mine"})
            assert assert_problem(refused, 429)["request_id"] == "mine"
            assert int(refused.headers["retry-after"]) >= 1
            with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
                # The first has its answer before its body is there.
                connection.sendall(f"{head}\r\n".encode())
                assert b" 429 " in connection.recv(10_000)
                requests = body + 300 * (f"{head}\r\n".encode() + body)
                last = f"{head}Connection: close\r\n\r\n".encode() + body
                connection.sendall(requests + last)
                answers = b"".join(iter(lambda: connection.recv(100_000), b""))
            assert answers.count(b"HTTP/1.1 429 ") == 301
    assert held.result().status_code == queued.result().status_code == 200
    gate = {"model": "gate", "version": "1"}
    assert sample(service, "inference_rejected_total", **gate, reason="queue_full") == 303
    assert sample(service, "inference_requests_total", **gate, outcome="rejected") == 303
    assert not [line for line in service.log_lines() if line["level"] == "error"]
