"""What a client can learn: the OpenAPI document, the models, the metrics; and who may ask."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from app.api.openapi import add_error_schemas
from tests.service.server import Service, Start, assert_problem

KEY, OLD_KEY = "correct horse battery staple", "tr0ub4dor&3"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def leave_midway() -> Iterator[bytes]:
    yield b"{"
    raise httpx.WriteError("gone")


def references(document: Any) -> set[str]:
    """Every `$ref` in `document`."""
    if isinstance(document, dict):
        own = {document["$ref"]} if isinstance(document.get("$ref"), str) else set()
        return own.union(*map(references, document.values()))
    if isinstance(document, list):
        return set().union(*map(references, document))
    return set()


class TestOpenAPI:
    def test_each_model_has_its_schemas_and_its_example(self, service: Service) -> None:
        document = service.client.get("/openapi.json").json()
        for path, model in [
            ("/v1/predict", "double"),
            ("/v1/models/double/predict", "double"),
            ("/v1/models/gate/predict", "gate"),
        ]:
            operation = document["paths"][path]["post"]
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            [example] = body["examples"]
            assert service.client.post(f"/v1/models/{model}/predict", json=example).is_success
            name = body["$ref"].rsplit("/", 1)[1]
            features = document["components"]["schemas"][name]["properties"]["features"]["$ref"]
            properties = document["components"]["schemas"][features.rsplit("/", 1)[1]]["properties"]
            assert properties.keys() == example["features"].keys()
            answer = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
            assert answer.endswith(f"/{model.capitalize()}PredictResponse")

    def test_errors_are_documented_as_problems(self, service: Service) -> None:
        document = service.client.get("/openapi.json").json()
        responses = document["paths"]["/v1/predict/batch"]["post"]["responses"]
        codes = {"401", "408", "413", "415", "422", "429", "500", "503", "504"}
        assert responses.keys() == codes | {"200"}
        for code in codes:
            [(kind, content)] = responses[code]["content"].items()
            assert kind == "application/problem+json"
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}

    def test_a_model_called_like_an_error_keeps_its_schema(self) -> None:
        schemas: dict[str, Any] = {"Problem": {"title": "Of a predictor"}}
        reference = add_error_schemas(schemas)["$ref"]
        assert schemas["Problem"] == {"title": "Of a predictor"}
        assert "detail" in schemas[reference.rpartition("/")[2]]["properties"]

    def test_every_path_is_documented_and_every_reference_resolves(self, service: Service) -> None:
        document = service.client.get("/openapi.json").json()
        assert {"/health", "/startup", "/ready", "/metrics", "/v1/models"} <= document[
            "paths"
        ].keys()
        for reference in references(document):
            node = document
            for part in reference.removeprefix("#/").split("/"):
                node = node[part]

    def test_the_docs_are_there(self, service: Service) -> None:
        assert "swagger" in service.client.get("/docs").text.lower()


class TestModels:
    def test_all_of_them_are_described(self, service: Service) -> None:
        models = service.client.get("/v1/models").json()["models"]
        assert [model["name"] for model in models] == ["double", "faulty", "gate"]
        assert [model["is_default"] for model in models] == [True, False, False]

    def test_one_is_described(self, service: Service) -> None:
        model = service.client.get("/v1/models/double").json()
        assert model["state"] == "ready"
        assert model["version"] == "1"
        assert model["versions"] == [{"version": "1", "state": "ready"}]
        assert model["provider"] == "cpu"
        assert re.fullmatch(r"[0-9a-f]{64}", model["artifact_digest"])
        assert model["input_schema"]["properties"].keys() == {"x", "note", "class"}
        assert model["output_schema"]["properties"].keys() == {"y"}


class TestMetrics:
    def test_requests_are_counted_by_route_and_probes_are_not(self, start: Start) -> None:
        service = start().wait_for("/ready")
        for _ in range(3):
            service.predict("double", x=1)
        service.predict("double", x="a")
        service.client.get("/some/path/that/is/not")
        service.client.get("/health")
        text = service.client.get("/metrics").text
        info = 'model_info{device="auto",digest="%s",model="double",provider="cpu",version="1"} 1.0'
        digest = service.client.get("/v1/models/double").json()["artifact_digest"]
        assert info % digest[:12] in text
        assert 'model_load_seconds{model="double",version="1"}' in text
        route = 'handler="/v1/models/double/predict",method="POST"'
        assert "http_requests_total{" + route + ',status="200"} 3.0' in text
        assert "http_requests_total{" + route + ',status="422"} 1.0' in text
        assert "http_request_duration_seconds_count{" + route + "} 4.0" in text
        # Of a route that nobody has asked there is nothing to say.
        assert 'http_request_duration_seconds_count{handler="/v1/predict"' not in text
        with pytest.raises(httpx.TransportError):
            service.client.post(
                "/v1/predict",
                content=leave_midway(),
                headers={"Content-Type": "application/json"},
            )
        service.wait_until(lambda: 'status="499"} 1.0' in service.client.get("/metrics").text)
        assert 'http_requests_total{handler="none",method="GET",status="404"} 1.0' in text
        for probe in ("/health", "/startup", "/ready", "/metrics"):
            assert f'handler="{probe}"' not in text


class TestApiKeys:
    @pytest.fixture
    def guarded(self, start: Start) -> Service:
        keys = f"{digest(KEY)}, {digest(OLD_KEY).upper()}"
        return start(API_KEYS_SHA256=keys).wait_for("/ready")

    def test_none_is_needed_where_none_is_set(self, service: Service) -> None:
        assert service.predict("double", x=1).status_code == 200

    def test_who_has_one_of_the_keys_may_ask(self, guarded: Service) -> None:
        body = {"features": {"x": 1}}
        for headers in (
            {"X-API-Key": KEY},
            {"X-API-Key": OLD_KEY},
            {"Authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer {OLD_KEY}"},
        ):
            answer = guarded.client.post("/v1/predict", json=body, headers=headers)
            assert answer.status_code == 200, headers
        assert guarded.client.get("/v1/models", headers={"X-API-Key": KEY}).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"X-API-Key": ""},
            {"X-API-Key": "wrong"},
            {"X-API-Key": digest(KEY)},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ],
    )
    def test_nobody_else_may(self, guarded: Service, headers: dict[str, str]) -> None:
        for method, path in [
            ("POST", "/v1/predict"),
            ("POST", "/v1/models/double/predict/batch"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/double"),
            ("GET", "/v1/nonesuch"),
        ]:
            answer = guarded.client.request(method, path, headers=headers)
            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"

    def test_probes_and_metrics_stay_open(self, guarded: Service) -> None:
        for path in ("/health", "/startup", "/ready", "/metrics", "/openapi.json"):
            assert guarded.client.get(path).status_code == 200

    def test_it_is_documented_and_never_logged(self, guarded: Service) -> None:
        for path in ("/v1/predict", "/v1/models/faulty/predict"):
            body = {"features": {"fault": "raise"}}
            guarded.client.post(path, json=body, headers={"X-API-Key": KEY})
        assert guarded.log_lines("prediction failed")
        document = guarded.client.get("/openapi.json").json()
        assert document["paths"]["/v1/predict"]["post"]["security"]
        assert "security" not in document["paths"]["/ready"]["get"]
        assert KEY not in guarded.log
        assert digest(KEY) not in guarded.log
