"""What FastAPI cannot be told about the API where its routes are declared."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.errors import Problem

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
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    if needs_key and needs_key(path):
                        operation["security"] = [{name: []} for name in API_KEY_SCHEMES]
            _, errors = models_json_schema(
                [(Problem, "serialization")], ref_template="#/components/schemas/{model}"
            )
            schema["components"]["schemas"] |= errors["$defs"]
            if needs_key:
                schema["components"]["securitySchemes"] = API_KEY_SCHEMES
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
