"""The log: a line for each request, with what became of it, and no storms of tracebacks."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from app import logs
from tests.service.server import Service, Start

ALWAYS = {"method", "path", "status", "duration_ms", "request_id"}
ALWAYS |= {"event", "level", "logger", "timestamp"}
OF_A_MODEL = {"model", "model_version"}
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


def record(
    line: int, created: float, error: Exception | None, level: int = logging.ERROR
) -> logging.LogRecord:
    exc_info = (type(error), error, None) if error else None
    # What a predictor logs may be anything.
    made = logging.LogRecord("app", level, "file", line, {}, None, exc_info)
    made.created = created
    return made


class TestStorms:
    def test_tracebacks_of_a_kind_are_few_and_the_others_are_counted(self) -> None:
        storm = logs.StormFilter()
        let_through = [storm.filter(record(1, 0, ValueError())) for _ in range(25)]
        assert let_through == [True] * logs.STORM_LINES + [False] * (25 - logs.STORM_LINES)
        later = record(1, logs.STORM_S, ValueError())
        assert storm.filter(later)
        assert later.__dict__["left_out"] == 25 - logs.STORM_LINES
        after_that = record(1, 2 * logs.STORM_S, ValueError())
        assert storm.filter(after_that)
        assert "left_out" not in after_that.__dict__

    def test_warnings_are_held_back_like_tracebacks(self) -> None:
        storm = logs.StormFilter()
        let_through = [storm.filter(record(1, 0, None, logging.WARNING)) for _ in range(25)]
        assert sum(let_through) == logs.STORM_LINES

    def test_another_kind_and_lines_of_no_concern_are_not_held_back(self) -> None:
        storm = logs.StormFilter()
        for _ in range(2 * logs.STORM_LINES):
            storm.filter(record(1, 0, ValueError()))
            assert storm.filter(record(1, 0, None, logging.INFO))
        assert storm.filter(record(1, 0, None))
        assert storm.filter(record(1, 0, OSError()))
        assert storm.filter(record(2, 0, ValueError()))

    def test_what_it_remembers_is_bounded(self) -> None:
        storm = logs.StormFilter()
        for number in range(10 * logs.STORM_KINDS):
            storm.filter(record(number, 0, ValueError()))
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


@pytest.mark.parametrize("workers", [1, 2])
def test_every_line_is_json_from_the_start_to_the_stop(start: Start, workers: int) -> None:
    service = start(WEB_CONCURRENCY=workers).wait_for("/ready")
    ask(service, "one", features={"x": 1})
    ask(service, "two", "/v1/models/faulty/predict", features={"fault": "raise"})
    line_of(service, "two")
    service.close()
    for line in service.log_lines():
        assert {"event", "level", "logger", "timestamp"} <= line.keys()
