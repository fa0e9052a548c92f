"""What FastAPI cannot be told about the API where its routes are declared."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from app.errors import PROBLEM_MEDIA_TYPE

API_KEY_SCHEMES = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}


def document(app: FastAPI, needs_key: Callable[[str], bool] | None) -> None:
    """Put the media type of errors and the API key into the OpenAPI document of `app`.

    Args:
        needs_key: whether a path is for callers with a key; None: there are no keys.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _correct_media_type(operation["responses"])
                    if needs_key and needs_key(path):
                        operation["security"] = [{name: []} for name in API_KEY_SCHEMES]
            if needs_key:
                schema["components"]["securitySchemes"] = API_KEY_SCHEMES
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _correct_media_type(responses: dict[str, Any]) -> None:
    # FastAPI documents every answer of a route under the media type of its success.
    for response in responses.values():
        content = response.get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        if schema.get("$ref") == "#/components/schemas/Problem":
            response["content"] = {PROBLEM_MEDIA_TYPE: content["application/json"]}
