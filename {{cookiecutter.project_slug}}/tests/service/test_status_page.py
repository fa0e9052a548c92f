"""The status page, as it comes over HTTP: complete without a browser, and safe in one."""

import base64
import hashlib
import json
import re
from datetime import date
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Base64Bytes, Field, create_model

from app.api.form import MAX_VALUE_CHARS, FormField, form_fields
from app.artifacts import new_version
from app.predictor import BaseFeatures
from tests.service.server import FAKES, Service, Start, assert_problem

DOUBLE = (FAKES / "double.py").read_text(encoding="utf-8")
HOSTILE = """</script></textarea><script>alert('1')</script>"><img src=x onerror="alert(2)">"""
KEY = "correct horse battery staple"


class Document(HTMLParser):
    """The elements of a page, each with its attributes and the text directly in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag, "elements are closed as they were opened"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data

    def text(self, tag: str, **attributes: str) -> list[str]:
        """Of each such element; `_` stands for `-` in the name of an attribute."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [
            self.texts.get(number, "").strip()
            for number, (found, has) in enumerate(self.elements)
            if found == tag and wanted.items() <= has.items()
        ]

    def controls(self, feature: str) -> list[dict[str, str | None]]:
        """Of the features of this name, in any form."""
        return [has for _, has in self.elements if has.get("data-field") == feature]


def page_of(service: Service) -> Document:
    answer = service.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Document(answer.text)


def only(tmp_path: Path, source: str) -> Path:
    """A folder with `source` as the only predictor, `double`."""
    folder = tmp_path / "predictors"
    folder.mkdir()
    (folder / "double.py").write_text(source, encoding="utf-8")
    return folder


class TestContent:
    def test_it_says_what_the_service_and_its_models_are(self, service: Service) -> None:
        page = page_of(service)
        title = service.client.get("/openapi.json").json()["info"]["title"]
        assert page.text("title") == page.text("h1") == [title]
        assert page.text("p", id="state") == ["ready"]
        # The default model comes first.
        assert page.text("h2") == ["double", "faulty", "gate"]
        assert page.text("span", data_of="state") == ["ready"] * 3
        assert page.text("b", data_of="version") == ["1"] * 3
        assert page.text("b", data_of="provider") == ["cpu"] * 3
        assert [has["href"] for tag, has in page.elements if tag == "a"] == [
            "docs",
            "openapi.json",
            "metrics",
        ]

    def test_each_model_has_a_form_and_that_of_the_default_is_open(self, service: Service) -> None:
        page = page_of(service)
        assert [has["data-path"] for tag, has in page.elements if tag == "form"] == [
            "v1/models/double/predict",
            "v1/models/faulty/predict",
            "v1/models/gate/predict",
        ]
        details = [has for tag, has in page.elements if tag == "details"]
        assert ["open" in has for has in details] == [True, False, False]
        example, _ = page.controls("x")
        assert (example["type"], example["value"]) == ("number", "21.0")
        assert [control["value"] for control in page.controls("class")] == ["even"]
        labels = {has["for"] for tag, has in page.elements if tag == "label"}
        assert labels == {has["id"] for _, has in page.elements if "data-field" in has}

    def test_a_model_is_counted_by_all_of_its_paths(self, service: Service) -> None:
        paths = [has["data-paths"] for tag, has in page_of(service).elements if tag == "section"]
        document = service.client.get("/openapi.json").json()["paths"]
        assert {path for some in paths for path in (some or "").split()} == {
            path for path, operations in document.items() if "post" in operations
        }
        assert paths[2] == "/v1/models/gate/predict /v1/models/gate/predict/batch"

    def test_while_a_model_loads(self, start: Start, tmp_path: Path, pipe: Path) -> None:
        slow = DOUBLE.replace("self.factor = ", f"Path({str(pipe)!r}).read_text(); self.factor = ")
        service = start(PREDICTORS_DIR=only(tmp_path, slow)).wait_for("/health")
        page = page_of(service)
        assert page.text("p", id="state") == ["loading"]
        assert page.text("p", id="fault") == [service.client.get("/ready").json()["detail"]]
        assert page.text("span", data_of="state") == ["loading"]
        assert page.text("b", data_of="version") == ["\N{EN DASH}"]
        pipe.write_text("go")
        service.wait_for("/ready")
        assert page_of(service).text("p", id="state") == ["ready"]

    def test_while_test_predictions_fail(self, start: Start, tmp_path: Path) -> None:
        flag = tmp_path / "broken"
        source = DOUBLE.replace("return [", f"assert not Path({str(flag)!r}).exists(); return [")
        service = start(PREDICTORS_DIR=only(tmp_path, source), READY_CACHE_S=0)
        service.wait_for("/ready")
        flag.touch()
        service.wait_for("/ready", 503)
        page = page_of(service)
        assert page.text("p", id="state") == ["not ready"]
        assert page.text("p", id="fault") == [service.client.get("/ready").json()["detail"]]

    def test_it_is_counted_but_not_in_the_api(self, service: Service) -> None:
        page_of(service)
        assert 'http_requests_total{handler="/",method="GET"' in service.client.get("/metrics").text
        assert "/" not in service.client.get("/openapi.json").json()["paths"]


class TestSafety:
    def test_nothing_but_its_own_script_and_style_can_run(self, service: Service) -> None:
        answer = service.client.get("/")
        page = Document(answer.text)
        policy = dict(
            part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
        )
        for tag, directive in (("script", "script-src"), ("style", "style-src")):
            [content] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert policy.pop(directive) == f"'sha256-{digest}'"
        assert policy == {
            "default-src": "'none'",
            "img-src": "data:",
            "connect-src": "'self'",
            "form-action": "'none'",
            "base-uri": "'none'",
            "frame-ancestors": "'none'",
        }
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        for _, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
            link = attributes.get("href") or attributes.get("src") or ""
            assert link.startswith("data:") or ":" not in link

    def test_what_a_predictor_and_the_settings_say_is_text(
        self, start: Start, tmp_path: Path
    ) -> None:
        source = DOUBLE.replace(
            'note: str = ""', f"note: str = Field(default={HOSTILE!r}, description={HOSTILE!r})"
        ).replace('alias="class"', f"alias={HOSTILE!r}")
        source = source.replace('"class": "even"', f"{HOSTILE!r}: 'even'")
        service = start(
            PREDICTORS_DIR=only(tmp_path, source),
            SERVICE_TITLE=HOSTILE,
            SERVICE_DESCRIPTION=HOSTILE,
        ).wait_for("/ready")
        page = page_of(service)
        assert page.text("h1") == page.text("title") == [HOSTILE]
        assert page.text("textarea", data_field="note") == [HOSTILE]
        assert f"{HOSTILE}; optional" in page.text("p")
        assert [control["value"] for control in page.controls(HOSTILE)] == ["even"]
        assert [tag for tag, _ in page.elements].count("script") == 1
        assert "img" not in [tag for tag, _ in page.elements]

    def test_nothing_of_a_request_is_in_it(self, service: Service) -> None:
        answer = service.client.get("/?swordfish", headers={"Referer": "http://swordfish/"})
        assert "swordfish" not in answer.text

    def test_with_keys_it_shows_nothing_that_needs_one(self, start: Start, tmp_path: Path) -> None:
        with new_version(
            tmp_path, "double", input_schema={}, metrics={"accuracy": 0.987654}
        ) as directory:
            (directory / "factor.txt").write_text("2")
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        service = start(
            API_KEYS_SHA256=digest,
            ARTIFACTS_DIR=tmp_path,
            PREDICTORS_DIR=only(tmp_path, DOUBLE),
        ).wait_for("/ready")
        html = service.client.get("/").text
        assert service.client.get("/v1/models").status_code == 401
        [model] = service.client.get("/v1/models", headers={"X-API-Key": KEY}).json()["models"]
        for secret in (
            digest,
            model["artifact_digest"][:12],
            model["created"][:10],
            "accuracy",
            "987654",
        ):
            assert secret not in html
        [key] = [has for _, has in Document(html).elements if "data-key" in has]
        assert key["type"] == "password"

    def test_without_keys_it_asks_for_none(self, service: Service) -> None:
        assert "password" not in [has.get("type") for _, has in page_of(service).elements]


def test_it_can_be_switched_off(start: Start) -> None:
    service = start(STATUS_PAGE="false").wait_for("/ready")
    assert_problem(service.client.get("/"), 404)


def test_a_platform_that_probes_its_path_has_it(start: Start) -> None:
    service = start(AIP_HEALTH_ROUTE="/").wait_for("/ready")
    assert service.client.get("/").content == b""


class Size(Enum):
    S = "s"
    L = "l"


class Inner(BaseFeatures):
    a: int


def form_field(annotation: Any, example: Any, default: Any = ...) -> FormField:
    """The field of a feature of this type."""
    features = create_model("Features", __base__=BaseFeatures, it=(annotation, default))
    [found] = form_fields(features.model_json_schema(), {"it": example})
    return found


class TestFields:
    @pytest.mark.parametrize(
        ("annotation", "example", "kind", "value"),
        [
            (int, 3, "number", "3"),
            (float, 1e-7, "number", "1e-07"),
            (int, 2**60, "number", str(2**60)),
            (bool, True, "flag", "true"),
            (str, "short", "text", "short"),
            (str, "two\nlines", "long text", "two\nlines"),
            (Base64Bytes, "aGVsbG8=" * 20, "long text", "aGVsbG8=" * 20),
            (date, "2026-01-31", "text", "2026-01-31"),
            (Literal["a", "b"], "b", "choice", '"b"'),
            (Literal[1, 2], 2, "choice", "2"),
            (Literal["only"], "only", "choice", '"only"'),
            (Size, "l", "choice", '"l"'),
            (list[float], [1.0, 2.0], "json", "[1.0, 2.0]"),
            (dict[str, int], {"ä": 1}, "json", '{\n  "ä": 1\n}'),
            (Inner, {"a": 1}, "json", '{\n  "a": 1\n}'),
            (int | str, "x", "json", '"x"'),
            (int | None, None, "number", ""),
            (bool | None, None, "choice", "null"),
            (Size | None, "s", "choice", '"s"'),
            (Inner | None, None, "json", ""),
            (Any, [1], "json", "[1]"),
        ],
    )
    def test_each_type_has_its_control_with_the_example(
        self, annotation: Any, example: Any, kind: str, value: str
    ) -> None:
        found = form_field(annotation, example)
        assert (found.kind, found.value) == (kind, value)

    @pytest.mark.parametrize(
        ("annotation", "limits", "hint"),
        [
            (Annotated[int, Field(ge=0, le=23)], {"step": "1", "min": "0", "max": "23"}, "0 to 23"),
            (
                Annotated[int, Field(gt=0, lt=5000)],
                {"step": "1", "min": "1", "max": "4999"},
                "more than 0, less than 5,000",
            ),
            (Annotated[float, Field(gt=0.5)], {"step": "any", "min": "0.5"}, "more than 0.5"),
            (Annotated[float, Field(le=1)] | None, {"step": "any", "max": "1"}, "at most 1"),
            (float, {"step": "any"}, ""),
        ],
    )
    def test_a_number_has_its_limits(
        self, annotation: Any, limits: dict[str, str], hint: str
    ) -> None:
        found = form_field(annotation, 1)
        assert found.limits == limits
        assert found.hint == hint

    @pytest.mark.parametrize(
        ("annotation", "default", "empty"),
        [
            (float, ..., None),
            (float, 1.0, None),
            (float | None, ..., "null"),
            (float | None, 1.0, "null"),
            (str, ..., '""'),
            (str, "x", None),
            (str | None, ..., "null"),
            (list[int], ..., None),
        ],
    )
    def test_what_is_left_empty_is_null_or_left_out(
        self, annotation: Any, default: Any, empty: str | None
    ) -> None:
        assert form_field(annotation, None, default).empty == empty

    def test_the_choices_are_of_the_schema(self) -> None:
        found = form_field(Literal["a", 1] | None, "a")
        assert [json.loads(choice) for choice, _ in found.choices] == ["a", 1, None]
        assert [label for _, label in found.choices] == ["a", "1", "null"]

    def test_an_example_that_would_make_the_page_large_is_left_out(self) -> None:
        found = form_field(list[float], [0.123] * (MAX_VALUE_CHARS // 5))
        assert found.value == ""
        assert "openapi.json" in found.hint

    def test_a_description_is_kept_beside_a_reference(self) -> None:
        found = form_field(Annotated[Size | None, Field(description="How large")], "s")
        assert found.description == "How large"
