"""GET /: the state of the service and a form for each model, for a browser.

The page shows what /ready, /metrics and the OpenAPI document say, which need no key, and nothing
else. Rates are differences that the browser takes of /metrics: that is the sum of all workers,
and a worker knows only itself.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from app.api.form import FormField, form_fields
from app.api.predict import PredictionRoutes
from app.api.probes import status_of
from app.lifecycle import Lifecycle, Phase
from app.repository import ServedModel

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class ModelForm:
    name: str
    is_default: bool
    description: str
    fields: list[FormField]
    paths: list[str]
    """Those that ask the model, by which /metrics counts."""


def add_status_page(app: FastAPI, routes: PredictionRoutes, lifecycle: Lifecycle) -> None:
    """Serve the page, unless / is taken: a platform may have its paths anywhere."""
    style, script = _read("status.css"), _read("status.js")
    fixed = {
        "title": app.title,
        "description": app.description,
        "api_version": app.version,
        "needs_key": bool(routes.settings.api_keys_sha256),
        "style": style,
        "script": script,
    }
    headers = {
        "Content-Security-Policy": _policy(style, script),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    # When first asked for: whatever a schema holds, no model is kept from its start by a page.
    @cache
    def forms() -> list[ModelForm]:
        default = lifecycle.repository.default
        models = lifecycle.repository.models.values()
        found = [_form(model, routes, is_default=model.name == default) for model in models]
        return sorted(found, key=lambda form: not form.is_default)

    @app.get("/", include_in_schema=False)
    async def status_page() -> HTMLResponse:
        status = status_of(lifecycle, await lifecycle.readiness_fault())
        is_unready = status.detail and status.status is Phase.READY
        state = "not ready" if is_unready else status.status
        template = await run_in_threadpool(_template)
        html = template.render(fixed, forms=forms(), status=status, state=state)
        return HTMLResponse(html, headers=headers)


@cache
def _template() -> "Template":
    # Three hundredths of a second, which no start is to wait for.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("status.html")


def _read(name: str) -> str:
    """A file beside this one, without the indentation, which is a tenth of it."""
    return re.sub(r"^ +", "", (FOLDER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy by which nothing runs or is loaded but what is in the page."""
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {_source(style)}",
            f"script-src {_source(script)}",
            "img-src data:",
            "connect-src 'self'",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
    return f"'sha256-{digest.decode()}'"


def _form(model: ServedModel, routes: PredictionRoutes, *, is_default: bool) -> ModelForm:
    predictor = model.predictor_class
    schema = predictor.features.model_json_schema()
    example = predictor.example.model_dump(mode="json", by_alias=True)
    return ModelForm(
        model.name,
        is_default,
        schema.get("description", ""),
        form_fields(schema, example),
        [path for path, route in routes.by_path.items() if route.model is model],
    )
