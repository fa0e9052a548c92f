"""What managed platforms do with a container, by their documented contracts, done here."""

import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest

from app.errors import StartupError
from app.main import create_app
from tests.service.server import FAKES, PROJECT, Service, Start, assert_problem, free_port
from tests.service.test_api import KEY, digest

ROWS = {"instances": [{"x": 1, "class": ""}, {"x": 2, "class": ""}]}
SCORED = {"predictions": [{"y": 2}, {"y": 4}]}

AIP_HEALTH = "/v1/endpoints/7/deployedModels/8"
AIP_PREDICT = "/v1/endpoints/7/deployedModels/8:predict"


class TestSageMaker:
    def test_the_argument_that_it_starts_containers_with_changes_nothing(self) -> None:
        # A setting that stops the start shows that it began.
        done = subprocess.run(
            [sys.executable, "-m", "app", "serve"],
            cwd=PROJECT,
            env={"PORT": "none"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PORT: Input should be a valid integer" in done.stderr

    def test_a_ping_is_answered_with_nothing_but_a_status(self, service: Service) -> None:
        answer = service.client.get("/ping")
        assert (answer.status_code, answer.content) == (200, b"")

    def test_an_invocation_gets_predictions(self, service: Service) -> None:
        headers = {
            "Accept": "application/json",
            "X-Amzn-SageMaker-Custom-Attributes": "trace=7",
            "X-Amzn-SageMaker-Inference-Id": "7",
        }
        answer = service.client.post("/invocations", json=ROWS, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == SCORED

    def test_an_error_has_its_status_and_names_the_field(self, service: Service) -> None:
        body = {"instances": [{"x": 1}, {"x": "two"}]}
        problem = assert_problem(service.client.post("/invocations", json=body), 422)
        assert problem["errors"][0]["field"] == "instances.1.x"
        assert_problem(service.client.post("/invocations", content="1,2"), 415)

    def test_who_may_ask_is_said_by_the_keys(self, start: Start) -> None:
        service = start(API_KEYS_SHA256=digest(KEY)).wait_for("/ping")
        assert_problem(service.client.post("/invocations", json=ROWS), 401)
        answer = service.client.post("/invocations", json=ROWS, headers={"X-API-Key": KEY})
        assert answer.json() == SCORED
        document = service.client.get("/openapi.json").json()
        assert document["paths"]["/invocations"]["post"]["security"]
        assert "security" not in document["paths"]["/ping"]["get"]


class TestVertexAI:
    def test_port_and_paths_are_those_that_it_sets(self, start: Start) -> None:
        port = free_port()
        service = start(
            AIP_HTTP_PORT=port, AIP_HEALTH_ROUTE=AIP_HEALTH, AIP_PREDICT_ROUTE=AIP_PREDICT
        )
        service.client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        assert service.wait_for(AIP_HEALTH).client.get(AIP_HEALTH).content == b""
        answer = service.client.post(AIP_PREDICT, json=ROWS | {"parameters": {}})
        assert answer.json() == SCORED
        assert service.client.post(AIP_PREDICT, json=ROWS | {"parameters": None}).is_success
        problem = assert_problem(
            service.client.post(AIP_PREDICT, json=ROWS | {"parameters": {"top_k": 3}}), 422
        )
        assert problem["errors"][0]["field"] == "parameters"

    def test_its_probe_needs_no_key_and_its_predictions_do(self, start: Start) -> None:
        service = start(
            API_KEYS_SHA256=digest(KEY), AIP_HEALTH_ROUTE=AIP_HEALTH, AIP_PREDICT_ROUTE=AIP_PREDICT
        ).wait_for(AIP_HEALTH)
        assert_problem(service.client.post(AIP_PREDICT, json=ROWS), 401)
        assert_problem(service.client.get("/v1/endpoints"), 401)
        handlers = service.client.get("/metrics").text
        assert AIP_PREDICT in handlers
        assert f'"{AIP_HEALTH}"' not in handlers
        paths = {line.get("path") for line in service.log_lines()}
        assert AIP_PREDICT in paths
        assert AIP_HEALTH not in paths

    def test_its_probe_may_be_ours(self, start: Start) -> None:
        start(AIP_HEALTH_ROUTE="/ready").wait_for("/ready")

    @pytest.mark.parametrize(
        ("variable", "path"),
        [
            ("AIP_PREDICT_ROUTE", "/v1/predict"),
            ("AIP_PREDICT_ROUTE", "/v1/models/double/predict"),
            ("AIP_PREDICT_ROUTE", "/ready"),
            ("AIP_PREDICT_ROUTE", "/ping"),
            ("AIP_HEALTH_ROUTE", "/v1/models"),
            ("AIP_HEALTH_ROUTE", "/v1/models/double"),
            ("AIP_HEALTH_ROUTE", "/health"),
            ("AIP_HEALTH_ROUTE", "/metrics"),
            ("AIP_HEALTH_ROUTE", "/docs"),
            ("AIP_HEALTH_ROUTE", "/invocations"),
        ],
    )
    def test_a_path_that_is_taken_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, fake_artifacts: Path, variable: str, path: str
    ) -> None:
        monkeypatch.setenv("PREDICTORS_DIR", str(FAKES))
        monkeypatch.setenv("ARTIFACTS_DIR", str(fake_artifacts))
        monkeypatch.setenv("DEFAULT_MODEL", "double")
        monkeypatch.setenv(variable, path)
        with pytest.raises(StartupError, match=f"{variable}: {path} is a path of this service"):
            create_app()
