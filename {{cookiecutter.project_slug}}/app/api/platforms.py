"""What managed platforms ask of a container: SageMaker and Vertex AI.

Both send `instances` for the default model to a path of their own and want `predictions`, and
nothing else, back; and both ask another path whether to send any. Their contracts:

- SageMaker: POST /invocations and GET /ping on port 8080, "Use your own inference code with hosting
  services" in its developer guide. It starts the container with the argument `serve`.
- Vertex AI: paths and port from the environment variables AIP_*, "Custom container requirements
  for inference" in its documentation.
"""

from collections.abc import Collection, Container
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Response
from pydantic import Field, create_model
from pydantic_core import to_json
from starlette.routing import Match

from app.api.instrumentation import METRICS
from app.api.json_route import Endpoint
from app.api.predict import PredictionRoutes, all_of, batch_endpoint, title_of
from app.api.probes import READY
from app.errors import StartupError
from app.lifecycle import Lifecycle
from app.repository import ServedModel

PREDICT = "/invocations"
PROBE = "/ping"


def add_platform_routes(
    app: FastAPI, routes: PredictionRoutes, lifecycle: Lifecycle
) -> Collection[str]:
    """Add them to all others; gives the paths that platforms probe.

    Raises:
        StartupError: a path that is asked for is taken.
    """
    settings, repository = routes.settings, lifecycle.repository
    predict, health = settings.aip_predict_route or PREDICT, settings.aip_health_route or PROBE
    _check("AIP_PREDICT_ROUTE", predict, app, free={PREDICT}, taken={PROBE, METRICS, health})
    _check("AIP_HEALTH_ROUTE", health, app, free={PROBE, READY}, taken={PREDICT, METRICS})
    if repository.default:
        model = repository.models[repository.default]
        endpoint = _instances_endpoint(model, settings.max_instances)
        for path in sorted({PREDICT, predict}):
            routes.add(path, model, endpoint, tag="platforms")
    probes = {PROBE, health} - {READY}

    async def probe() -> Response:
        return Response(status_code=503 if await lifecycle.readiness_fault() else 200)

    for path in sorted(probes):
        app.get(path, tags=["platforms"], summary="Requests are answered, as by /ready")(probe)
    return probes


def _check(
    variable: str, path: str, app: FastAPI, *, free: Container[str], taken: Container[str]
) -> None:
    """Whether `path`, which `variable` asks for, may be what it asks for."""
    scope = {"type": "http", "path": path, "method": "GET"}
    is_known = any(route.matches(scope)[0] is not Match.NONE for route in app.routes)
    if path not in free and (path in taken or is_known):
        raise StartupError(
            f"{variable}: {path} is a path of this service; leave the routes of the model empty, "
            "and Vertex AI gives its own."
        )


def _instances_endpoint(model: ServedModel, max_instances: int) -> Endpoint:
    instances = batch_endpoint(model, max_instances)
    title = title_of(model)
    request_type = create_model(
        f"{title}PlatformRequest",
        __base__=instances.request_type,
        parameters=(dict[str, Any] | None, Field(default=None, max_length=0)),
    )
    predictions = list[model.predictor_class.prediction]  # type: ignore[name-defined]
    response_type = create_model(f"{title}PlatformResponse", predictions=(predictions, ...))

    return replace(
        instances,
        request_type=request_type,
        response_type=response_type,
        content_of=lambda answer, _: to_json({"predictions": all_of(answer)}, by_alias=True),
    )
