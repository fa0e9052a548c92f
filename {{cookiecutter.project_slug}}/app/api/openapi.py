"""What FastAPI cannot be told about the API where its routes are declared."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.errors import PROBLEM_MEDIA_TYPE, FieldError, Problem

API_KEY_SCHEMES = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}


def document(app: FastAPI, needs_key: Callable[[str], bool] | None) -> None:
    """Put the schema of errors and the API key into the OpenAPI document of `app`.

    Args:
        needs_key: whether a path is for callers with a key; None: there are no keys.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            errors = add_error_schemas(schema["components"]["schemas"])
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    for response in operation["responses"].values():
                        if PROBLEM_MEDIA_TYPE in response.get("content", {}):
                            response["content"] = {PROBLEM_MEDIA_TYPE: {"schema": errors}}
                    if needs_key and needs_key(path):
                        operation["security"] = [{name: []} for name in API_KEY_SCHEMES]
            if needs_key:
                schema["components"]["securitySchemes"] = API_KEY_SCHEMES
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def add_error_schemas(schemas: dict[str, Any]) -> dict[str, str]:
    """Add what an error's body looks like to `schemas`, and refer to it."""
    errors = {Problem.__name__, FieldError.__name__}
    # A predictor may have a model of the same name.
    prefix = "" if errors.isdisjoint(schemas) else "app__errors__"
    template = "#/components/schemas/" + prefix + "{model}"
    _, found = models_json_schema([(Problem, "serialization")], ref_template=template)
    schemas |= {prefix + name: schema for name, schema in found["$defs"].items()}
    return {"$ref": template.format(model=Problem.__name__)}
