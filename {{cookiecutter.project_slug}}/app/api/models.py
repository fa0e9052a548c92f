"""GET /v1/models: what is served, in which version and state."""

from functools import cache
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import AwareDatetime, BaseModel, Field
from pydantic.json_schema import JsonSchemaMode

from app.api.problems import problems
from app.predictor import Provider
from app.repository import ModelRepository, State


class VersionInfo(BaseModel):
    version: str
    state: State | Literal["available"]


class ModelInfo(BaseModel):
    name: str
    is_default: bool = Field(description="Whether /v1/predict asks this model.")
    state: State
    version: str | None = Field(description="The version that answers.")
    versions: list[VersionInfo] = Field(
        description="Those on disk, oldest first; `available` ones are not loaded."
    )
    provider: Provider | None = Field(description="What it computes on.")
    artifact_digest: str | None = Field(
        description="SHA-256 over the files of the version that answers."
    )
    created: AwareDatetime | None
    metrics: dict[str, float] = Field(description="How good it was when it was trained.")
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class ModelList(BaseModel):
    models: list[ModelInfo]


def add_model_routes(app: FastAPI, repository: ModelRepository) -> None:
    # Plain functions: they read the disk, so FastAPI runs them in a thread.
    @app.get("/v1/models", tags=["models"], summary="All models")
    def list_models() -> ModelList:
        return ModelList(models=[_describe(repository, name) for name in repository.models])

    @app.get(
        "/v1/models/{model}",
        tags=["models"],
        summary="One model",
        responses=problems(HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND),
    )
    def get_model(model: str) -> ModelInfo:
        return _describe(repository, model)


def _describe(repository: ModelRepository, name: str) -> ModelInfo:
    model = repository.get(name)
    artifact = model.artifact
    return ModelInfo(
        name=name,
        is_default=name == repository.default,
        state=model.state,
        version=model.version,
        versions=[
            VersionInfo(
                version=version,
                state=model.state if version == model.version else "available",
            )
            for version in repository.versions(name)
        ],
        provider=model.provider,
        artifact_digest=artifact.digest if artifact else None,
        created=artifact.manifest.created if artifact else None,
        metrics=artifact.manifest.metrics if artifact else {},
        input_schema=_schema(model.predictor_class.features, "validation"),
        output_schema=_schema(model.predictor_class.prediction, "serialization"),
    )


@cache
def _schema(rows: type[BaseModel], mode: JsonSchemaMode) -> dict[str, Any]:
    return rows.model_json_schema(mode=mode)
