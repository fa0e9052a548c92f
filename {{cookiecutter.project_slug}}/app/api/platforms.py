"""What managed platforms ask of a container: SageMaker and Vertex AI.

Both send `instances` for the default model to a path of their own and want `predictions`, and
nothing else, back; and both ask another path whether to send any. Their contracts:

- SageMaker: POST /invocations and GET /ping on port 8080, "Use your own inference code with hosting
  services" in its developer guide. It starts the container with the argument `serve`.
- Vertex AI: paths and port from the environment variables AIP_*, "Custom container requirements
  for inference" in its documentation.
"""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field, create_model

from app.api.json_route import CallParameter, Endpoint
from app.api.predict import PredictionRoutes, batch_endpoint, declare_body, title_of
from app.api.probes import PROBES
from app.errors import StartupError
from app.lifecycle import Lifecycle
from app.repository import ServedModel

PREDICT = "/invocations"
PROBE = "/ping"


def add_platform_routes(
    app: FastAPI, routes: PredictionRoutes, lifecycle: Lifecycle
) -> Collection[str]:
    """The paths that platforms probe.

    Raises:
        StartupError: a path that is asked for is taken.
    """
    settings, repository = routes.settings, lifecycle.repository
    probes = {PROBE, settings.aip_health_route or PROBE}
    if repository.default:
        model = repository.models[repository.default]
        endpoint = _instances_endpoint(model, settings.max_instances)
        for path in (PREDICT, settings.aip_predict_route):
            if path in routes.by_path:
                raise StartupError(
                    f"AIP_PREDICT_ROUTE: {path} answers in a form of its own; leave the model's "
                    "predictRoute empty, or give it another path, such as /vertex."
                )
            if path:
                routes.add(path, model, endpoint, tag="platforms")

    async def probe() -> Response:
        return Response(status_code=503 if await lifecycle.readiness_fault() else 200)

    for path in sorted(probes.difference(PROBES)):
        app.get(path, tags=["platforms"], summary="Requests are answered, as by /ready")(probe)
    return probes


def _instances_endpoint(model: ServedModel, max_instances: int) -> Endpoint:
    batch = batch_endpoint(model, max_instances)
    title = title_of(model)
    request_type = create_model(
        f"{title}PlatformRequest",
        __base__=batch.request_type,
        parameters=(dict[str, Any] | None, Field(default=None, max_length=0)),
    )
    predictions = list[model.predictor_class.prediction]  # type: ignore[name-defined]
    response_type = create_model(f"{title}PlatformResponse", predictions=(predictions, ...))

    async def predict(body: BaseModel, call: CallParameter) -> dict[str, Any]:
        answer = await batch.function(body, call)
        return {"predictions": answer["predictions"]}

    example = {"instances": [model.predictor_class.example.model_dump(mode="json", by_alias=True)]}
    declare_body(predict, request_type, example)
    return Endpoint(predict, request_type, response_type, f"Score rows with {model.name}")
