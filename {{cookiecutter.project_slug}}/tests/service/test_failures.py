"""Models that fail, hang or are swamped: the caller is told, and the next one is served."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.service.server import FAKES, Service, Start, assert_problem, publish
from tests.service.test_batches import sample


class TestFaultyModel:
    @pytest.mark.parametrize(
        "fault", ["raise", "nothing", "generator", "type", "nan", "stop", "exit"]
    )
    def test_it_is_a_500_that_tells_nothing_of_the_inside(
        self, service: Service, fault: str
    ) -> None:
        answer = service.predict("faulty", fault=fault)
        problem = assert_problem(answer, 500)
        for secret in ("swordfish", "Traceback", "ValueError", "predictors", ".py"):
            assert secret not in answer.text
        assert "exc_locals" not in service.log
        assert '"locals"' not in service.log
        [line] = service.log_lines_of(problem["request_id"], "prediction failed")
        assert line["model"] == "faulty"
        assert line["exception"]

    @pytest.mark.parametrize(("fault", "count"), [("short", 0), ("long", 2)])
    def test_a_wrong_number_of_predictions_is_stated(
        self, service: Service, fault: str, count: int
    ) -> None:
        problem = assert_problem(service.predict("faulty", fault=fault), 500)
        assert problem["detail"] == f"The model gave {count} predictions for 1 rows."

    def test_a_row_it_cannot_score_is_named(self, service: Service) -> None:
        problem = assert_problem(service.predict("faulty", fault="item"), 422)
        assert problem["errors"] == [{"field": "features.fault", "message": "cannot be scored"}]
        rows = [{"fault": "none"}, {"fault": "item"}, {"fault": "item"}]
        answer = service.client.post("/v1/models/faulty/predict/batch", json={"instances": rows})
        errors = assert_problem(answer, 422)["errors"]
        assert [error["field"] for error in errors] == ["instances.1.fault", "instances.2.fault"]

    def test_any_sequence_will_do(self, service: Service) -> None:
        assert service.predict("faulty", fault="deque").json()["prediction"] == {"y": 1}

    def test_the_next_request_is_served(self, service: Service) -> None:
        assert service.predict("faulty", fault="raise").status_code == 500
        assert service.predict("faulty", fault="none").json()["prediction"] == {"y": 1}
        assert service.client.get("/ready").status_code == 200


def hold(service: Service, pipe: Path, pool: ThreadPoolExecutor, **features: Any) -> Any:
    """Begin a request that the `gate` model works on until something is written to `pipe`."""
    return pool.submit(service.predict, "gate", pipe=str(pipe), **features)


class TestSlowModel:
    def test_late_is_504_and_others_and_probes_are_served(self, start: Start, pipe: Path) -> None:
        service = start(REQUEST_TIMEOUT_S=1).wait_for("/ready")
        with ThreadPoolExecutor() as pool:
            late = hold(service, pipe, pool)
            with pipe.open("w"):
                assert_problem(late.result(), 504)
                # The model is still held.
                assert_problem(service.predict("gate", pipe="/dev/null"), 504)
                assert service.client.get("/health").status_code == 200
                assert service.predict("double", x=1).json()["prediction"] == {"y": 2}
        assert service.wait_for("/ready").predict("gate", pipe="/dev/null").status_code == 200

    def test_an_expired_request_never_reaches_the_model(
        self, start: Start, pipe: Path, tmp_path: Path
    ) -> None:
        service = start(REQUEST_TIMEOUT_S=1).wait_for("/ready")
        with ThreadPoolExecutor() as pool:
            first = hold(service, pipe, pool)
            # Opens when the model has opened its side: it is at work.
            with pipe.open("w"):
                assert_problem(service.predict("gate", pipe=str(tmp_path / "expired")), 504)
                assert_problem(first.result(), 504)
        # Had it reached the model, that would fail for want of the file, and log it.
        assert service.wait_for("/ready").predict("gate", pipe="/dev/null").status_code == 200
        assert not service.log_lines("prediction failed")

    def test_too_many_waiting_rows_are_429(self, start: Start, pipe: Path) -> None:
        service = start(QUEUE_MAX_ROWS=3, MAX_INSTANCES=3).wait_for("/ready")
        with ThreadPoolExecutor(max_workers=10) as pool:
            first = hold(service, pipe, pool, x=1)
            # Opens when the model has opened its side: it is at work.
            with pipe.open("w") as gate:
                others = [pool.submit(service.predict, "gate", pipe="/dev/null") for _ in range(8)]
                service.wait_until(lambda: sum(other.done() for other in others) == 5)
                gate.write("go")
            assert first.result().json()["prediction"]["said"] == "go"
            answers = [other.result() for other in others]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 5
        for answer in refused:
            assert_problem(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1


class TestBatch:
    def test_rows_of_several_requests_reach_the_model_together(
        self, start: Start, tmp_path: Path
    ) -> None:
        source = (FAKES / "double.py").read_text(encoding="utf-8")
        source = source.replace("[Prediction(y=self.factor * row.x)", "[Prediction(y=len(batch))")
        (tmp_path / "double.py").write_text(source, encoding="utf-8")
        service = start(
            PREDICTORS_DIR=tmp_path,
            BATCH_POLICY="window",
            BATCH_MAX_WAIT_MS=10_000,
            BATCH_MAX_ROWS=4,
            REQUEST_TIMEOUT_S=20,
        ).wait_for("/startup")
        with ThreadPoolExecutor(max_workers=4) as pool:
            # Four of them make a full batch, which need not wait for the end of the window.
            answers = list(pool.map(lambda x: service.predict("double", x=x), range(4)))
        assert [answer.json()["prediction"]["y"] for answer in answers] == [4, 4, 4, 4]

    def test_one_that_makes_the_batch_fail_fails_alone(self, start: Start) -> None:
        service = start(
            BATCH_POLICY="window", BATCH_MAX_WAIT_MS=10_000, BATCH_MAX_ROWS=8, REQUEST_TIMEOUT_S=20
        ).wait_for("/startup")
        faults = ["none", "none", "raise", "none", "short", "none", "none", "none"]
        with ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(lambda fault: service.predict("faulty", fault=fault), faults))
        statuses = [answer.status_code for answer in answers]
        assert statuses == [200, 200, 500, 200, 500, 200, 200, 200]
        assert len(service.log_lines("prediction failed")) == 2

    def test_a_request_larger_than_a_batch_is_split_and_answered_in_order(
        self, start: Start
    ) -> None:
        service = start(BATCH_MAX_ROWS=3).wait_for("/ready")
        rows = [{"x": number} for number in range(20)]
        answer = service.client.post("/v1/predict/batch", json={"instances": rows})
        assert [row["y"] for row in answer.json()["predictions"]] == [2 * n for n in range(20)]


@pytest.fixture
def moody(start: Start, tmp_path: Path) -> Callable[..., Service]:
    """Starts a service whose model fails as long as there is a file `unwell` in `tmp_path`."""
    source = (FAKES / "faulty.py").read_text(encoding="utf-8")
    check = f"        if Path({str(tmp_path / 'unwell')!r}).exists(): raise OSError('unwell')\n"
    source = source.replace("        good = ", f"{check}        good = ")
    (tmp_path / "faulty.py").write_text(source, encoding="utf-8")
    publish(tmp_path, "faulty", none=b"")
    return partial(start, DEFAULT_MODEL="faulty", PREDICTORS_DIR=tmp_path, ARTIFACTS_DIR=tmp_path)


class TestReadiness:
    def test_it_fails_and_recovers_with_the_model(
        self, moody: Callable[..., Service], tmp_path: Path
    ) -> None:
        service = moody(READY_CACHE_S=0).wait_for("/ready")
        (tmp_path / "unwell").touch()
        answer = service.client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["detail"] == "Model faulty: The model failed on this request."
        assert service.client.get("/health").status_code == 200
        (tmp_path / "unwell").unlink()
        assert service.client.get("/ready").status_code == 200

    def test_the_result_is_kept_for_a_while(
        self, moody: Callable[..., Service], tmp_path: Path
    ) -> None:
        service = moody(READY_CACHE_S=300).wait_for("/ready")
        (tmp_path / "unwell").touch()
        assert service.client.get("/ready").status_code == 200

    def test_a_busy_model_stays_ready_and_a_stuck_one_does_not(
        self, start: Start, pipe: Path
    ) -> None:
        service = start(READY_CACHE_S=0, REQUEST_TIMEOUT_S=2).wait_for("/ready")
        with ThreadPoolExecutor() as pool:
            request = hold(service, pipe, pool)
            with pipe.open("w"):
                # The test prediction waits behind the request, and the last verdict holds.
                assert service.client.get("/ready").status_code == 200
                assert_problem(request.result(), 504)
                stuck = service.wait_for("/ready", status=503).client.get("/ready").json()
                assert stuck["detail"] == "Model gate: a test prediction has not come back."
        service.wait_for("/ready")

    def test_nor_is_one_whose_queue_is_full(self, start: Start, pipe: Path) -> None:
        service = start(READY_CACHE_S=0, REQUEST_TIMEOUT_S=25, MAX_INSTANCES=1, QUEUE_MAX_ROWS=1)
        service.wait_for("/ready")
        with ThreadPoolExecutor() as pool:
            request = hold(service, pipe, pool)
            with pipe.open("w"):
                waiting = pool.submit(service.predict, "gate", pipe="/dev/null")
                depth = partial(sample, service, "inference_queue_depth", model="gate", version="1")
                service.wait_until(lambda: depth() == 1)
                assert_problem(service.predict("gate", pipe="/dev/null"), 429)
                assert service.client.get("/ready").status_code == 200
            assert request.result().status_code == waiting.result().status_code == 200
