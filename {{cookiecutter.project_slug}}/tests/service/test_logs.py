"""The log: a line for each request, with what became of it, and no storms of tracebacks."""

import contextlib
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from app import logs
from app.errors import PredictionFailed
from app.settings import Settings
from tests.service.server import FAKES, PROJECT, WAIT_S, Service, Start, free_port

ALWAYS = {"method", "path", "status", "duration_ms", "request_id"}
ALWAYS |= {"event", "level", "logger", "timestamp"}
OF_A_MODEL = {"model", "model_version"}
CALLERS = 24
OF_A_BATCH = {"batch_rows", "queue_wait_ms", "compute_ms"}


def line_of(service: Service, request_id: str) -> dict[str, object]:
    service.wait_until(lambda: service.log_lines_of(request_id, "request"))
    [line] = service.log_lines_of(request_id, "request")
    return line


def ask(service: Service, request_id: str, path: str = "/v1/predict", **body: object) -> None:
    service.client.post(path, json=body, headers={"X-Request-ID": request_id})


class TestRequests:
    def test_one_that_reached_the_model(self, service: Service) -> None:
        rows = [{"x": number + 0.5} for number in range(5)]
        ask(service, "miss", "/v1/predict/batch", instances=rows)
        line = line_of(service, "miss")
        assert line.keys() == ALWAYS | OF_A_MODEL | OF_A_BATCH | {"cache"}
        assert (line["model"], line["model_version"], line["cache"]) == ("double", "1", "miss")
        assert line["batch_rows"] == 5
        assert isinstance(line["queue_wait_ms"], float)
        assert isinstance(line["compute_ms"], float)

    def test_one_that_the_cache_answered(self, service: Service) -> None:
        ask(service, "first", features={"x": 99})
        ask(service, "again", features={"x": 99})
        line = line_of(service, "again")
        assert line.keys() == ALWAYS | OF_A_MODEL | {"cache"}
        assert line["cache"] == "hit"

    def test_one_that_was_refused(self, service: Service) -> None:
        ask(service, "invalid", features={"x": "swordfish"})
        line = line_of(service, "invalid")
        assert line.keys() == ALWAYS | OF_A_MODEL
        assert line["status"] == 422
        assert "swordfish" not in service.log

    def test_one_that_the_model_could_not_score(self, service: Service) -> None:
        ask(service, "failed", "/v1/models/faulty/predict", features={"fault": "raise"})
        line = line_of(service, "failed")
        assert line.keys() == ALWAYS | OF_A_MODEL | OF_A_BATCH
        assert line["status"] == 500

    def test_one_that_is_for_no_model(self, service: Service) -> None:
        service.client.get("/v1/models", headers={"X-Request-ID": "models"})
        assert line_of(service, "models").keys() == ALWAYS


def record(line: int, error: Exception | None, level: int = logging.ERROR) -> logging.LogRecord:
    exc_info = (type(error), error, None) if error else None
    # What a predictor logs may be anything.
    return logging.LogRecord("app", level, "file", line, {}, None, exc_info)


def failed(cause: Exception, model: str) -> logging.LogRecord:
    """As app.inference tells of any failure of any model."""
    error = PredictionFailed("The model raised.")
    error.__cause__ = cause
    made = record(1, error)
    made.model = model
    return made


class TestStorms:
    def test_tracebacks_of_a_kind_are_few_and_the_others_are_counted(self) -> None:
        now = 0.0
        storm = logs.StormFilter(clock=lambda: now)
        let_through = [storm.filter(record(1, ValueError())) for _ in range(25)]
        assert let_through == [True] * logs.STORM_LINES + [False] * (25 - logs.STORM_LINES)
        now = logs.STORM_S
        later = record(1, ValueError())
        assert storm.filter(later)
        assert later.__dict__["left_out"] == 25 - logs.STORM_LINES
        now = 2 * logs.STORM_S
        after_that = record(1, ValueError())
        assert storm.filter(after_that)
        assert "left_out" not in after_that.__dict__

    def test_warnings_are_held_back_like_tracebacks(self) -> None:
        storm = logs.StormFilter()
        let_through = [storm.filter(record(1, None, logging.WARNING)) for _ in range(25)]
        assert sum(let_through) == logs.STORM_LINES

    def test_another_fault_of_a_model_and_another_model_are_not_held_back(self) -> None:
        storm = logs.StormFilter()
        for _ in range(2 * logs.STORM_LINES):
            storm.filter(failed(ValueError(), "a"))
        assert not storm.filter(failed(ValueError(), "a"))
        assert storm.filter(failed(KeyError(), "a"))
        assert storm.filter(failed(ValueError(), "b"))

    def test_another_kind_and_lines_of_no_concern_are_not_held_back(self) -> None:
        storm = logs.StormFilter()
        for _ in range(2 * logs.STORM_LINES):
            storm.filter(record(1, ValueError()))
            assert storm.filter(record(1, None, logging.INFO))
        assert storm.filter(record(1, None))
        assert storm.filter(record(1, OSError()))
        assert storm.filter(record(2, ValueError()))

    def test_what_it_remembers_is_bounded(self) -> None:
        storm = logs.StormFilter()
        for number in range(10 * logs.STORM_KINDS):
            storm.filter(record(number, ValueError()))
        assert sys.getsizeof(storm.__dict__["_seen"]) < 100_000

    def test_a_service_whose_model_always_fails_says_why_ten_times(self, start: Start) -> None:
        service = start().wait_for("/ready")
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(lambda _: service.predict("faulty", fault="raise").status_code, range(40))
            )
        assert answers == [500] * 40
        service.wait_until(lambda: len(service.log_lines("request")) >= 40)
        assert len(service.log_lines("prediction failed")) == logs.STORM_LINES


def render(**event: object) -> str:
    config = logs.logging_config(Settings(log_format="json", default_model="double"))
    formatter = config["formatters"]["structured"]
    make = formatter.pop("()")
    made = logging.makeLogRecord({"name": "app", "levelname": "ERROR", "levelno": 40} | event)
    line: str = make(**formatter).format(made)
    return line


class TestPlainLines:
    def test_they_are_as_structlog_would_write_them(self) -> None:
        [plain, structured] = [
            render(msg="a \u2603 of %d%%", args=(5,), **extra) for extra in ({}, {"x": 1})
        ]
        of_structlog = json.loads(structured)
        assert of_structlog.pop("x") == 1
        found = json.loads(plain)
        assert list(found) == list(of_structlog)
        for timestamp in (found.pop("timestamp"), of_structlog.pop("timestamp")):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", timestamp)
        assert found == of_structlog

    def test_those_of_a_request_have_its_id(self) -> None:
        token = logs.current_request_id.set("mine")
        shown = json.loads(render(msg="one"))
        logs.current_request_id.reset(token)
        assert shown["request_id"] == "mine"

    def test_those_with_a_stack_have_it(self) -> None:
        shown = json.loads(render(msg="here", stack_info="Stack (most recent call last):"))
        assert shown["stack_info"].startswith("Stack")


def fail(depth: int) -> None:
    if depth:
        fail(depth - 1)
    raise ValueError("x" * 3000)


class TestLongLines:
    def test_the_outer_frames_and_the_ends_of_texts_are_left_out(self) -> None:
        try:
            fail(40)
        except ValueError:
            line = render(msg="m" * 5000, exc_info=sys.exc_info())
        assert len(line) < logs.LINE_BYTES
        shown = json.loads(line)
        assert shown["is_shortened"] is True
        assert shown["event"].startswith("mmm")
        assert shown["level"] == "error"
        [error] = shown["exception"]
        assert error["exc_type"] == "ValueError"
        assert error["frames"][-1]["name"] == "fail"

    def test_whatever_it_is_it_fits(self) -> None:
        fields = {f"field_{number}": {"deep": ["\u2603" * 500] * 50} for number in range(200)}
        line = render(msg="all of it", **fields)
        assert len(line) < logs.LINE_BYTES
        assert json.loads(line)["event"] == "all of it"

    def test_a_line_that_fits_is_left_alone(self) -> None:
        shown = json.loads(render(msg="short", numbers=list(range(100))))
        assert shown["numbers"] == list(range(100))
        assert "is_shortened" not in shown


def test_lines_of_two_workers_are_whole_though_they_are_read_slowly(
    fake_artifacts: Path,
) -> None:
    """Through a pipe that is full most of the time."""
    environment = {
        "PATH": os.environ["PATH"],
        "PORT": str(free_port()),
        "BIND_ADDRESS": "127.0.0.1",
        "WEB_CONCURRENCY": "2",
        "PREDICTORS_DIR": str(FAKES),
        "ARTIFACTS_DIR": str(fake_artifacts),
        "DEFAULT_MODEL": "double",
        # Those who are answered together have their lines written together.
        "BATCH_POLICY": "window",
        "BATCH_MAX_WAIT_MS": "20",
        "CACHE_ENABLED": "false",
        "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
    }
    url = f"http://127.0.0.1:{environment['PORT']}/v1/predict"
    command = [sys.executable, "-m", "app"]
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE)
    assert process.stderr
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, logs.LINE_BYTES)

    headers = {"X-Request-ID": "i" * 128}

    def ask_until_it_is_over(_: int) -> None:
        with httpx.Client() as client:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    client.post(url, json={"features": {"x": 1}}, headers=headers)

    lines = 0
    with ThreadPoolExecutor(CALLERS) as callers:
        asking = [callers.submit(ask_until_it_is_over, number) for number in range(CALLERS)]
        try:
            for line in process.stderr:
                json.loads(line)
                lines += 1
                if lines == 2000:
                    process.terminate()
        finally:
            # The workers end when they see that it has gone, and the callers with it.
            process.kill()
            process.wait()
    assert lines > 2000
    assert [future.result(WAIT_S) for future in asking] == [None] * CALLERS
    process.stderr.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_line_is_json_from_the_start_to_the_stop(start: Start, workers: int) -> None:
    service = start(WEB_CONCURRENCY=workers).wait_for("/ready")
    ask(service, "one", features={"x": 1})
    ask(service, "two", "/v1/models/faulty/predict", features={"fault": "raise"})
    line_of(service, "two")
    service.close()
    for line in service.log_lines():
        assert {"event", "level", "logger", "timestamp"} <= line.keys()


class TestWarnings:
    def service(
        self, start: Start, folder: Path, load: str = "", predict: str = "", **settings: str
    ) -> Service:
        """Of a model that does these in its methods."""
        source = "import warnings\n" + (FAKES / "double.py").read_text(encoding="utf-8")
        for line, code in (("self.factor = ", load), ("return [Prediction", predict)):
            source = source.replace(line, f"{code}\n        {line}")
        (folder / "double.py").write_text(source)
        return start(PREDICTORS_DIR=folder, **settings).wait_for("/ready")

    def warned(self, service: Service, text: str) -> list[dict[str, object]]:
        return [line for line in service.log_lines() if text in str(line["event"])]

    def test_those_of_loading_are_lines_like_any_other(self, start: Start, tmp_path: Path) -> None:
        service = self.service(start, tmp_path, load="warnings.warn('of another version')")
        [line] = self.warned(service, "of another version")
        assert (line["logger"], line["level"]) == ("py.warnings", "warning")

    def test_those_of_requests_are_ignored(self, start: Start, tmp_path: Path) -> None:
        warn = "warnings.warn(f'this is {batch[0].x}')"
        service = self.service(start, tmp_path, predict=warn)
        assert service.predict("double", x=1234).status_code == 200
        assert self.warned(service, "this is 21")
        assert not self.warned(service, "this is 1234")

    def test_or_not_where_python_was_told(self, start: Start, tmp_path: Path) -> None:
        warn = "warnings.warn(f'this is {batch[0].x}')"
        service = self.service(start, tmp_path, predict=warn, PYTHONWARNINGS="always")
        assert service.predict("double", x=1234).status_code == 200
        service.wait_until(lambda: self.warned(service, "this is 1234"))

    def test_those_that_were_made_errors_still_are(self, start: Start, tmp_path: Path) -> None:
        make = "warnings.simplefilter('error'); warnings.simplefilter('ignore', FutureWarning)"
        warn = "warnings.warn('later', FutureWarning)\n"
        warn += "        if batch[0].x > 100: warnings.warn('overflow', RuntimeWarning)"
        service = self.service(start, tmp_path, load=make, predict=warn)
        assert service.predict("double", x=1).status_code == 200
        assert service.predict("double", x=1234).status_code == 500

    def test_each_place_has_its_own_ten(self) -> None:
        storm = logs.StormFilter()
        passed = [
            storm.filter(
                logging.makeLogRecord(
                    {"name": "py.warnings", "levelno": 30, "msg": f"a.py:{line}: UserWarning: x"}
                )
            )
            for line in range(12)
            for _ in range(11)
        ]
        assert passed.count(True) == 12 * logs.STORM_LINES
