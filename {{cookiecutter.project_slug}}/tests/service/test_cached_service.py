"""The response cache, seen from outside."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.caching import double, runs
from tests.service.server import FAKES, Service, Start, publish
from tests.service.test_batches import sample


class TestHttp:
    def test_the_second_time_it_is_a_hit(self, start: Start) -> None:
        service = start().wait_for("/ready")
        before = runs(service)
        first, second = double(service, 1), double(service, 1.0)
        assert first.headers["x-cache"] == "miss"
        assert "age" not in first.headers
        assert second.headers["x-cache"] == "hit"
        assert 0 <= int(second.headers["age"]) < 60
        assert first.json()["prediction"] == second.json()["prediction"] == {"y": 2}
        assert first.json()["request_id"] != second.json()["request_id"]
        assert runs(service) == before + 1
        labels = {"model": "double", "version": "1"}
        assert sample(service, "cache_hits_total", tier="memory", **labels) == 1
        assert sample(service, "cache_misses_total", **labels) == 1

    def test_so_it_is_without_reading_the_body_again(self, start: Start) -> None:
        service = start().wait_for("/ready")

        def post(path: str = "/v1/predict", kind: str = "application/json", **headers: str) -> Any:
            headers |= {"Content-Type": kind}
            return service.client.post(path, content=b'{"features": {"x": 4}}', headers=headers)

        before = runs(service)
        answers = [post() for _ in range(4)]
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", *3 * ["hit"]]
        assert {answer.json()["prediction"]["y"] for answer in answers} == {8}
        assert len({answer.json()["request_id"] for answer in answers}) == 4
        assert all(0 <= int(answer.headers["age"]) < 60 for answer in answers[1:])
        labels = {"model": "double", "version": "1"}
        assert sample(service, "cache_hits_total", tier="memory", **labels) == 3
        assert sample(service, "inference_requests_total", outcome="ok", **labels) == 4
        assert post("/v1/models/double/predict").headers["x-cache"] == "hit"
        assert runs(service) == before + 1
        # What would have been refused still is.
        assert post("/v1/predict/batch").status_code == 422
        assert post("/v1/models/faulty/predict").status_code == 422
        assert post(kind="text/plain").status_code == 415
        assert post(**{"X-Request-Timeout-Ms": "soon"}).status_code == 422
        assert post(**{"Cache-Control": "no-cache"}).headers["x-cache"] == "bypass"
        assert runs(service) == before + 2

    def test_a_batch_asks_for_what_it_lacks(self, start: Start) -> None:
        service = start().wait_for("/ready")
        double(service, 2)
        before = runs(service)
        body = {"instances": [{"x": x} for x in (1, 2, 3, 1)]}
        statuses = []
        for _ in range(2):
            answer = service.client.post("/v1/predict/batch", json=body)
            assert [row["y"] for row in answer.json()["predictions"]] == [2, 4, 6, 2]
            statuses.append(answer.headers["x-cache"])
        assert statuses == ["miss", "hit"]
        assert runs(service) == before + 2

    def test_the_caller_may_pass_it_by(self, start: Start) -> None:
        service = start().wait_for("/ready")
        double(service, 1)
        before = runs(service)
        for control in ("no-cache", "max-age=0, No-Cache", "no-store"):
            answer = double(service, 1, **{"Cache-Control": control})
            assert answer.headers["x-cache"] == "bypass"
        assert runs(service) == before + 3
        assert double(service, 1, **{"Cache-Control": "max-age=60"}).headers["x-cache"] == "hit"
        double(service, 5, **{"Cache-Control": "no-store"})
        assert double(service, 5).headers["x-cache"] == "miss"
        double(service, 6, **{"Cache-Control": "no-cache"})
        assert double(service, 6).headers["x-cache"] == "hit"
        labels = {"model": "double", "version": "1"}
        assert sample(service, "cache_bypasses_total", **labels) == 5

    def test_also_in_several_lines(self, start: Start) -> None:
        service = start().wait_for("/ready")
        lines = [("Cache-Control", "no-store"), ("Cache-Control", "max-age=0")]
        body: Any = {"features": {"x": 7}}
        answer = service.client.post("/v1/predict", json=body, headers=lines)
        assert answer.headers["x-cache"] == "bypass"
        assert double(service, 7).headers["x-cache"] == "miss"

    def test_what_it_holds_is_told(self, start: Start) -> None:
        service = start().wait_for("/ready")
        assert sample(service, "cache_bytes") == 0
        double(service, 1)
        service.wait_until(lambda: sample(service, "cache_bytes") > 0)
        held = sample(service, "cache_bytes")
        assert held < 1000
        for x in range(2, 102):
            double(service, x)
        service.wait_until(lambda: sample(service, "cache_bytes") > 90 * held)

    def test_that_is_no_more_than_it_may(self, start: Start) -> None:
        service = start(CACHE_MAX_BYTES=2000).wait_for("/ready")
        for x in range(1, 31):
            double(service, x)
        assert double(service, 30).headers["x-cache"] == "hit"
        assert double(service, 1).headers["x-cache"] == "miss"
        assert 0 < sample(service, "cache_bytes") <= 2000

    def test_errors_are_not_kept(self, service: Service) -> None:
        for fault in ("raise", "item"):
            before = sample(service, "cache_misses_total", model="faulty", version="1")
            for _ in range(2):
                assert service.predict("faulty", fault=fault).status_code in (500, 422)
            after = sample(service, "cache_misses_total", model="faulty", version="1")
            assert after == before + 2

    def test_it_can_be_switched_off(self, start: Start) -> None:
        service = start(CACHE_ENABLED="false").wait_for("/ready")
        assert "x-cache" not in double(service, 1).headers
        assert "x-cache" not in double(service, 1).headers

    def test_also_for_one_model(self, service: Service) -> None:
        assert "x-cache" not in service.predict("gate", pipe="/dev/null").headers
        assert "x-cache" in service.predict("double", x=1).headers

    @pytest.mark.parametrize("of_model", [False, True])
    def test_it_expires(self, start: Start, tmp_path: Path, of_model: bool) -> None:
        environment: dict[str, Any] = {"CACHE_TTL_S": "0.05"}
        if of_model:
            source = (FAKES / "double.py").read_text()
            (tmp_path / "predictors").mkdir()
            (tmp_path / "predictors/double.py").write_text(
                source.replace("    example =", "    cache_ttl_s = 0.05\n    example =")
            )
            environment = {"PREDICTORS_DIR": tmp_path / "predictors"}
        service = start(**environment).wait_for("/ready")
        double(service, 1)
        service.wait_until(lambda: double(service, 1).headers["x-cache"] == "miss")

    def test_a_model_whose_rows_cannot_be_told_apart_is_not_cached(
        self, start: Start, tmp_path: Path
    ) -> None:
        source = (FAKES / "double.py").read_text()
        source = source.replace("import Field", "import Field, SecretStr")
        source = source.replace('note: str = ""', 'note: SecretStr = SecretStr("")')
        (tmp_path / "predictors").mkdir()
        (tmp_path / "predictors/double.py").write_text(source)
        publish(tmp_path / "artifacts", "double", factor_txt=b"2")
        service = start(
            PREDICTORS_DIR=tmp_path / "predictors", ARTIFACTS_DIR=tmp_path / "artifacts"
        ).wait_for("/ready")
        assert "x-cache" not in double(service, 1).headers
        [line] = [line for line in service.log_lines() if "not cached" in line["event"]]
        assert "SecretStr" in line["event"]
