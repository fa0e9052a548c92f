"""GET /health, /startup and /ready, for load balancers and Kubernetes."""

from typing import Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from app.lifecycle import Lifecycle, Phase
from app.predictor import Provider
from app.repository import State

READY = "/ready"
PROBES = ("/health", "/startup", READY)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ModelStatus(BaseModel):
    state: State
    version: str | None
    provider: Provider | None


class Status(BaseModel):
    status: Phase
    detail: str | None = Field(default=None, description="Why the answer is 503.")
    models: dict[str, ModelStatus]


def status_of(lifecycle: Lifecycle, fault: str | None) -> Status:
    return Status(
        status=lifecycle.phase,
        detail=fault,
        models={
            name: ModelStatus(state=model.state, version=model.version, provider=model.provider)
            for name, model in lifecycle.repository.models.items()
        },
    )


def add_probe_routes(app: FastAPI, lifecycle: Lifecycle) -> None:
    unavailable: dict[int | str, dict[str, Any]] = {503: {"model": Status}}

    def status(response: Response, fault: str | None) -> Status:
        response.status_code = 503 if fault else 200
        return status_of(lifecycle, fault)

    @app.get("/health", tags=["operations"], summary="The process lives")
    async def health() -> Health:
        return Health()

    @app.get(
        "/startup",
        tags=["operations"],
        summary="The models are loaded and warm",
        responses=unavailable,
    )
    async def startup(response: Response) -> Status:
        return status(response, None if lifecycle.is_started else "Models are loading.")

    @app.get(
        READY,
        tags=["operations"],
        summary="Requests are answered",
        responses=unavailable,
    )
    async def ready(response: Response) -> Status:
        return status(response, await lifecycle.readiness_fault())
