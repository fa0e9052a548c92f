"""`make load`: what it sends is valid, what it counts is true, and what it starts it stops."""

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self

import pytest
from pydantic import Field, model_validator

from app.discovery import PredictorClass, discover
from app.predictor import BaseFeatures
from loadtest import advice, report
from loadtest.advice import Findings, Objective
from loadtest.batches import Batch
from loadtest.client import MAX_CONNECTIONS, Client, Tally, Target, new_loop
from loadtest.measure import Step, Usage, step_of, usage_between
from loadtest.reasons import advise
from loadtest.variations import body, variations
from tests.service.server import FAKES, PROJECT, WAIT_S, Start, free_port, publish

PREDICTORS = discover(PROJECT / "predictors")
REQUEST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\n{}"


class TestVariations:
    @pytest.mark.parametrize("name", PREDICTORS)
    def test_they_are_valid_and_differ(self, name: str) -> None:
        example = PREDICTORS[name].example
        rows = variations(example)
        assert next(iter(rows)) == body(example)
        for content, row in rows.items():
            sent = json.dumps(json.loads(content)["features"])
            assert type(example).model_validate_json(sent) == row
        assert variations(example).keys() == rows.keys()

    def test_each_kind_of_field_is_varied_if_it_can_be(self) -> None:
        rows = [json.loads(content)["features"] for content in variations(EXAMPLE)]
        assert len(rows) > 900

        def values(name: str) -> set[str]:
            return {json.dumps(row[name]) for row in rows}

        assert len(values("amount")) > 900
        assert all(isinstance(row["count"], int) and row["count"] <= 12 for row in rows)
        assert len(values("count")) > 3
        assert values("color") == {'"red"', '"green"'}
        assert values("kind") == {'"a"', '"b"', "null"} - {"null"}
        assert values("flag") == {"true", "false"}
        assert len(values("readings")) > 900
        assert len(values("inner")) > 900
        assert values("text") == {'"as it is"'}
        assert values("nothing") == {"null"}
        # Valid as it is in the example alone.
        assert values("exact") == {"7"}

    def test_fields_that_do_not_go_together_are_left_alone(self) -> None:
        rows = variations(Range(low=1.0, high=1.5))
        assert 1 < len(rows) < 1000
        assert all(row.low <= row.high for row in rows.values() if isinstance(row, Range))


class Inner(BaseFeatures):
    ratio: float = Field(ge=0, le=1)


class Everything(BaseFeatures):
    amount: float = Field(gt=0)
    count: int = Field(ge=0, le=12)
    color: Literal["red", "green"]
    kind: Literal["a", "b"] | None
    flag: bool
    readings: list[float]
    inner: Inner
    text: str
    nothing: int | None
    exact: int = Field(gt=6, lt=8)


EXAMPLE = Everything(
    amount=1250.0,
    count=10,
    color="red",
    kind="a",
    flag=True,
    readings=[1.5, -2.0],
    inner=Inner(ratio=0.5),
    text="as it is",
    nothing=None,
    exact=7,
)


class Range(BaseFeatures):
    low: float
    high: float

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class CountingServer(ThreadingHTTPServer):
    """Counts what it is asked for, by itself. While `is_open` is not set, it answers nothing."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CountingHandler)
        self.count = 0
        self.status = 200
        self.is_open = threading.Event()
        self.is_open.set()
        self.on_first: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    @property
    def target(self) -> Target:
        return Target("127.0.0.1", self.server_address[1])


class CountingHandler(BaseHTTPRequestHandler):
    server: CountingServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.count += 1
            if self.server.count == 1:
                self.server.on_first()
        self.server.is_open.wait(WAIT_S)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.is_open.set()
        server.shutdown()
        thread.join()


def drive(
    server: CountingServer,
    load: Callable[[Client], Coroutine[Any, Any, Tally]],
    patience_s: float = WAIT_S,
) -> Tally:
    async def main() -> Tally:
        client = Client(server.target, [REQUEST], patience_s)
        try:
            return await load(client)
        finally:
            await client.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main())


class TestClient:
    def test_a_closed_loop_counts_what_the_server_counts(self, server: CountingServer) -> None:
        tally = drive(server, lambda client: client.closed_loop(4, 0.3))
        assert tally.due == len(tally.latencies) == server.count > 4
        assert tally.unanswered == tally.broken == 0

    def test_so_does_an_open_loop(self, server: CountingServer) -> None:
        tally = drive(server, lambda client: client.open_loop(200, 0.5))
        assert tally.due == len(tally.latencies) == server.count
        assert 50 < tally.due < 200
        assert max(tally.begun) < 0.5

    def test_other_answers_are_told_apart(self, server: CountingServer) -> None:
        server.status = 429
        tally = drive(server, lambda client: client.closed_loop(2, 0.2))
        assert tally.refusals == {429: server.count}
        assert not tally.latencies
        step = step_of(2, tally, Usage())
        assert step.failed == 1
        assert step.per_s == 0

    def test_a_stall_is_charged_to_all_that_it_keeps_waiting(self, server: CountingServer) -> None:
        """Those too that were not sent meanwhile, for want of a connection."""
        seconds = 0.3
        server.is_open.clear()
        server.on_first = threading.Timer(1.5 * seconds, server.is_open.set).start
        tally = drive(server, lambda client: client.open_loop(3000, seconds))
        assert len(tally.latencies) == tally.due == server.count > MAX_CONNECTIONS
        assert tally.waited == tally.due - MAX_CONNECTIONS
        answered = zip(tally.begun, tally.latencies, strict=True)
        assert all(begun + latency > seconds for begun, latency in answered)
        assert step_of(3000, tally, Usage()).per_s == 0

    def test_what_is_never_answered_is_given_up(self, server: CountingServer) -> None:
        server.is_open.clear()
        tally = drive(server, lambda client: client.open_loop(2000, 0.2), patience_s=0.1)
        assert tally.unanswered == tally.due > 0
        assert server.count <= MAX_CONNECTIONS

    def test_a_server_that_is_gone(self) -> None:
        gone = Target("127.0.0.1", free_port())

        async def main() -> None:
            await Client(gone, [REQUEST], 1).closed_loop(1, 0.1)

        with pytest.raises(ConnectionRefusedError), asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())


class TestStep:
    def test_what_it_says_is_of_the_answers_with_200(self) -> None:
        begun, latencies = [0.0, 0.5, 1.0, 1.9], [0.01, 0.02, 0.03, 0.4]
        tally = Tally(2, due=8, begun=begun, latencies=latencies, refusals=Counter({429: 3}))
        said = step_of(4, tally, Usage())
        assert tally.unanswered == 1
        assert said.failed == 0.5
        # The last one was answered after the end.
        assert said.per_s == 1.5
        assert (said.p50_ms, said.p95_ms, said.p99_ms) == (20, 400, 400)
        assert said.mean_ms == pytest.approx(115)

    def test_growth_is_in_seconds_a_second(self) -> None:
        begun = [n / 100 for n in range(400)]
        queue_builds_up = Tally(4, due=400, begun=begun, latencies=[0.1 + n / 10 for n in begun])
        assert step_of(100, queue_builds_up, Usage()).growth == pytest.approx(0.1)
        a_little = Tally(4, due=400, begun=begun, latencies=[0.9 + n / 10 for n in begun])
        assert step_of(100, a_little, Usage()).growth == 0

    def test_counters_that_others_have_raised_are_not_used(self) -> None:
        tally = Tally(1, due=100, begun=[0.0] * 100, latencies=[0.001] * 100, lasted=2)
        names = "inference_batch_size_sum", "inference_batch_size_count"
        before = dict.fromkeys((*names, "inference_requests_total"), 10.0)
        ours = dict(zip(before, (110.0, 60.0, 110.0), strict=True))
        cpu = "process_cpu_seconds_total"
        usage = usage_between(before | {cpu: 1}, ours | {cpu: 2}, tally)
        assert usage == Usage(rows_per_batch=2, queue_ms=None, cpu=0.5)
        assert usage_between(before, ours, tally).cpu is None
        for count in (60.0, 160.0):
            other = ours | {"inference_requests_total": count}
            assert usage_between(before, other, tally) == Usage()


def step(rate: float, p99_ms: float, mean_ms: float = 1, **others: Any) -> Step:
    fields = {
        "per_s": rate,
        "p50_ms": mean_ms,
        "p95_ms": p99_ms,
        "failed": 0,
        "growth": 0,
        "client_cpu": 0.5,
    }
    return Step(asked=rate, mean_ms=mean_ms, p99_ms=p99_ms, **(fields | others))


class TestAdvice:
    objective = Objective(p99_ms=100, rate=1000)
    predictor: PredictorClass = discover(FAKES)["double"]

    def said(self, steps: list[Step], **others: Any) -> dict[str, str]:
        fields: dict[str, Any] = {
            "predictor": self.predictor,
            "objective": self.objective,
            "batches": [Batch(1, 1), Batch(32, 2)],
            "max_rows": 32,
        }
        return dict(advise(Findings(steps=steps, **(fields | others))))

    def test_the_knee_is_where_power_is_greatest(self) -> None:
        steps = [step(100, 5, 1), step(200, 6, 1.2), step(300, 20, 3), step(400, 90, 40)]
        assert advice.knee(steps) is steps[1]
        assert advice.knee([step(100, 5, failed=0.001)]) is None

    def test_the_capacity_is_the_highest_rate_that_meets_the_objective(self) -> None:
        met, late = step(300, 99), step(400, 101)
        failing, growing = step(500, 50, failed=0.02), step(600, 50, growth=0.2)
        steps = [step(100, 5), met, late, failing, growing]
        assert advice.capacity(steps, self.objective) is met
        assert advice.replicas(1000, met) == 5
        assert advice.replicas(10, met) == 2
        said = self.said(steps)
        assert said["Capacity"].startswith("300 requests a second,")
        assert said["Replicas"].startswith("5 for 1,000 requests a second")

    def test_a_rate_below_it_that_failed_is_told(self) -> None:
        assert (
            "1 of the lower rates"
            in self.said([step(100, 200), step(200, 50), step(300, 500)])["Capacity"]
        )

    def test_a_capacity_that_was_not_reached(self) -> None:
        assert self.said([step(100, 5), step(200, 5)])["Capacity"].startswith("at least 200")

    def test_without_a_capacity_nothing_is_advised_on_replicas(self) -> None:
        said = self.said([step(100, 500), step(200, 900, failed=0.5)])
        assert said["Capacity"].startswith("none: no rate had p99 within 100 ms,")
        assert said.keys() == {"Knee", "Capacity", "BATCH_MAX_ROWS"}

    def test_the_smallest_batch_that_is_nearly_the_most_productive(self) -> None:
        batches = [Batch(1, 1), Batch(8, 2), Batch(32, 5), Batch(64, 7.5), Batch(128, 15)]
        assert advice.best_batch(batches, Objective(100)).rows == 64
        assert advice.best_batch(batches, Objective(50)).rows == 32
        # A row alone takes more than a tenth: with the batch before, half is what there is.
        slow = [Batch(1, 40), Batch(4, 41), Batch(8, 60)]
        assert advice.best_batch(slow, Objective(100)).rows == 4
        # Nothing can be had by smaller ones.
        found = Findings(self.predictor, Objective(50), slow, [step(10, 500)], max_rows=4)
        assert advice.advised_batch(found).rows == 4

    def test_a_predictor_that_chooses_its_batches_itself(self) -> None:
        own = type("Own", (self.predictor,), {"batch_max_rows": 8})
        said = self.said([step(100, 5)], predictor=own)
        assert "batch_max_rows = 8" in said["BATCH_MAX_ROWS"]
        assert said["autoscale-keda"].startswith("threshold: 8,")
        fixed = type("Fixed", (self.predictor,), {"allowed_batch_sizes": (1, 32)})
        assert "are 1, 32" in self.said([step(100, 5)], predictor=fixed)["BATCH_MAX_ROWS"]

    def test_a_limit_that_does_is_left_as_it_is(self) -> None:
        small, full, large = Batch(1, 0.2), Batch(32, 0.4), Batch(256, 2)
        steps = [step(1000, 5)]
        # 80,000 and 128,000 rows a second, where a request takes a thousandth of one.
        kept = self.said(steps, batches=[small, full, large])
        assert kept["BATCH_MAX_ROWS"].startswith("32, as it is: batches of 32 take 0.4 ms,")
        assert "256 would give more, but" in kept["BATCH_MAX_ROWS"]
        assert kept["autoscale-keda"].startswith("threshold: 32,")
        felt = self.said([step(50_000, 5)], batches=[small, full, large])
        assert felt["BATCH_MAX_ROWS"].startswith("256 (now 32): 23.4% less work")
        assert felt["autoscale-keda"].startswith("threshold: 256,")
        slow = self.said(steps, batches=[Batch(1, 4), Batch(8, 8), Batch(32, 15.2)])
        assert slow["BATCH_MAX_ROWS"].startswith("8 (now 32): 32 take 15.2 ms, too long")

    def test_the_target_leaves_room_for_half_as_much_again(self) -> None:
        steps = [step(r, 5, usage=Usage(cpu=r / 320)) for r in (100, 200, 300)]
        said = self.said(steps)["autoscale-hpa"]
        assert said.startswith("averageUtilization: 62 ")
        assert "already" not in said
        cpus = {100: 0.6, 200: 0.8, 300: 0.9}
        early = [step(r, 5, usage=Usage(cpu=cpu)) for r, cpu in cpus.items()]
        assert (
            "is reached at 100 requests a second already"
            in self.said([step(50, 5, usage=Usage(cpu=0.3)), *early])["autoscale-hpa"]
        )
        idle = [step(r, 5, usage=Usage(cpu=0.1)) for r in (100, 200, 300)]
        assert "autoscale-keda" in self.said(idle)["autoscale-hpa"]
        busy = [step(r, 5, usage=Usage(cpu=1.8)) for r in (100, 200, 300)]
        assert "60, of 2 CPUs" in self.said(busy)["autoscale-hpa"]
        assert "not known" in self.said([step(100, 5)])["autoscale-hpa"]

    def test_the_picture_is_no_wider_than_a_terminal(self) -> None:
        drawn = report.picture([step(100 * n, 3.0**n, 1.1**n) for n in range(1, 13)])
        assert {"x", "o"} < set(drawn)
        assert max(map(len, drawn.splitlines())) <= 80
        assert "\x1b" not in drawn
        assert report.picture([step(100, 5)]) == ""

    def test_a_load_test_that_was_the_bottleneck_says_so(self) -> None:
        [note] = report.notes([step(1, 1, client_cpu=0.95, usage=Usage(rows_per_batch=1))])
        assert "had no CPU to spare" in note


@pytest.fixture
def load(fake_artifacts: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m loadtest` with these arguments and settings."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **settings: object) -> subprocess.Popen[str]:
        own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        own["PYTHONPYCACHEPREFIX"] = os.environ.get("PYTHONPYCACHEPREFIX", "")
        fakes = {"PREDICTORS_DIR": FAKES, "ARTIFACTS_DIR": fake_artifacts}
        fakes["DEFAULT_MODEL"] = Path("double")
        process = subprocess.Popen(
            [sys.executable, "-m", "loadtest", *arguments],
            cwd=PROJECT,
            env=own | {name: str(value) for name, value in (fakes | settings).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.communicate()


Load = Callable[..., subprocess.Popen[str]]


def assert_nobody_listens(printed: str) -> None:
    [port] = re.findall(r"Starting the service at http://127\.0\.0\.1:(\d+),", printed)
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", int(port))) != 0


class TestCommand:
    def test_it_measures_advises_and_stops_what_it_has_started(self, load: Load) -> None:
        process = load("--seconds", "0.1", "--rate", "100000")
        printed, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, errors
        assert errors == ""
        assert_nobody_listens(printed)
        tables = re.findall(
            r"^ *(?:connections|requests/s).*\n((?: +[\d.,]+ .*\n)+)", printed, re.MULTILINE
        )
        closed, opened = ([line.split() for line in table.splitlines()] for table in tables)
        assert [int(cells[0]) for cells in closed] == [1, 2, 4, 8, 16, 32, 64]
        assert len(opened) == 12
        # One row in each batch when one connection asks, and no "-": the service's counters agree.
        assert closed[0][5] == "1.00"
        assert "Latency in ms, by requests a second" in printed
        for name in ("Knee", "Capacity", "BATCH_MAX_ROWS"):
            assert re.search(rf"^{name} +\S", printed, re.MULTILINE), printed
        assert max(map(len, printed.splitlines())) <= 80

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_stops_the_service_when_it_is_stopped(self, load: Load, number: int) -> None:
        process = load("--seconds", "30")
        assert process.stdout
        printed = ""
        while "Closed loop" not in printed:
            line = process.stdout.readline()
            assert line, process.communicate()
            printed += line
        process.send_signal(number)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
        assert "Traceback" not in errors
        assert_nobody_listens(printed)

    def test_a_service_that_runs_is_asked_with_a_key(
        self, load: Load, start: Start, tmp_path: Path
    ) -> None:
        digest = hashlib.sha256(b"open sesame").hexdigest()
        service = start(API_KEYS_SHA256=digest).wait_for("/ready")
        arguments = ("--url", service.url, "--seconds", "0.05")
        assert failure(load(*arguments)) == "the example is answered with 401; set LOAD_API_KEY"

        # Its model's files need not be here.
        process = load(*arguments, LOAD_API_KEY="open sesame", ARTIFACTS_DIR=tmp_path)
        printed, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, errors
        assert "open sesame" not in printed
        assert "Starting the service" not in printed
        assert service.process.poll() is None
        assert "Batches are not timed here: double: there is no" in printed
        assert re.search(r"^BATCH_MAX_ROWS +not known", printed, re.MULTILINE)


class TestBadInput:
    """Each is answered with one line."""

    def test_an_unknown_model(self, load: Load) -> None:
        line = failure(load("--model", "triple"))
        assert line == "there is no model triple; choose of: double, faulty, gate"

    def test_nobody_at_the_address(self, load: Load) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        assert failure(load("--url", url)).startswith(f"{url}/ready: ")

    def test_no_artifact(self, load: Load, tmp_path: Path) -> None:
        # All models load at the same time, and the first that fails is named.
        line = failure(load(ARTIFACTS_DIR=tmp_path))
        assert re.search(r"python -m training\.(double|faulty|gate),", line)

    def test_a_service_that_does_not_start(self, load: Load, tmp_path: Path) -> None:
        publish(tmp_path, "double", factor_txt=b"2")
        line = failure(load(ARTIFACTS_DIR=tmp_path))
        assert re.match(r"The service did not start: (faulty|gate): there is no", line)

    @pytest.mark.parametrize(
        "arguments",
        [("--rate", "0"), ("--rate", "nan"), ("--seconds", "x"), ("--url", "http://here:x")],
    )
    def test_arguments(self, load: Load, arguments: tuple[str, str]) -> None:
        process = load(*arguments)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 2
        assert f"argument {arguments[0]}: " in errors.splitlines()[-1]
        assert "Traceback" not in errors


def failure(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1, errors
    [line] = errors.splitlines()
    return line.removeprefix("loadtest: ")
