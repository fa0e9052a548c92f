"""POST /v1/predict and /v1/predict/batch, and the same for each model by name."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from operator import attrgetter
from time import monotonic, time
from typing import Annotated

from fastapi import FastAPI
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, create_model
from pydantic_core import to_json

from app.api.bodies import Bodies
from app.api.json_route import Call, Endpoint, JsonRoute, Rules
from app.api.keys import ApiKeys
from app.api.problems import problems
from app.errors import FieldError, InvalidInput, invalid_fields
from app.inference import Answer
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.repository import ModelRepository, ServedModel
from app.settings import Settings

PROBLEMS = problems(
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)


class PredictRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    features: BaseFeatures


class BatchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    instances: list[BaseFeatures]


class _Answer(BaseModel):
    request_id: str = Field(
        description="The caller's X-Request-ID, or one made here; it finds the request in the logs."
    )
    model: str
    model_version: str
    processing_time_ms: float = Field(
        description="Time on the server, from when the request's header came to the answer."
    )
    timestamp: AwareDatetime


class PredictResponse(_Answer):
    prediction: BasePrediction


class BatchResponse(_Answer):
    predictions: list[BasePrediction] = Field(
        description="One for each instance, in the order of the request."
    )


class PredictionRoutes:
    """The routes that ask a model. FastAPI documents them; `RequestContext` calls them."""

    def __init__(self, app: FastAPI, settings: Settings, keys: ApiKeys) -> None:
        self.settings = settings
        self.by_path: dict[str, JsonRoute] = {}
        self._app = app
        bodies = Bodies(settings.max_body_bytes, settings.queue_max_bytes)
        self._rules = Rules(settings.request_timeout_s, keys, bodies)

    def add(self, path: str, model: ServedModel, endpoint: Endpoint, tag: str = "predict") -> None:
        route = JsonRoute(path, endpoint, model, self._rules)
        self.by_path[path] = route
        self._app.router.add_api_route(
            path,
            endpoint.documented(),
            methods=["POST"],
            response_model=endpoint.response_type,
            responses=PROBLEMS,
            summary=endpoint.summary,
            tags=[tag],
            openapi_extra=route.openapi_extra,
        )


def add_predict_routes(app: FastAPI, routes: PredictionRoutes, repository: ModelRepository) -> None:
    """Route each model with its own schemas, and the default model without a name as well."""
    for name, model in repository.models.items():
        prefixes = [f"/v1/models/{name}"]
        if name == repository.default:
            prefixes.insert(0, "/v1")
        for prefix in prefixes:
            routes.add(f"{prefix}/predict", model, _single(model))
            batch = batch_endpoint(model, routes.settings.max_instances)
            routes.add(f"{prefix}/predict/batch", model, batch)

    @app.post("/v1/models/{model}/predict", include_in_schema=False)
    @app.post("/v1/models/{model}/predict/batch", include_in_schema=False)
    async def no_such_model(model: str) -> None:
        repository.get(model)


def _single(model: ServedModel) -> Endpoint:
    predictor = model.predictor_class
    title = title_of(model)
    request_type = create_model(
        f"{title}PredictRequest", __base__=PredictRequest, features=(predictor.features, ...)
    )
    response_type = create_model(
        f"{title}PredictResponse", __base__=PredictResponse, prediction=(predictor.prediction, ...)
    )
    example = {"features": predictor.example.model_dump(mode="json", by_alias=True)}
    content_of = _Envelope(model, "prediction")

    def answer_with(answer: Answer, call: Call) -> bytes:
        if answer.errors:
            raise _refused(answer.errors, lambda _: "features")
        said = answer.content or to_json(answer.outcomes[0], by_alias=True)
        return content_of(said, answer, call)

    return Endpoint(
        request_type,
        response_type,
        lambda body: [body.features],
        answer_with,
        f"Score one row with {model.name}",
        example,
        takes_one_row=True,
    )


def batch_endpoint(model: ServedModel, max_instances: int) -> Endpoint:
    """Scores the `instances` of a request, and answers with as many `predictions`."""
    content_of = _Envelope(model, "predictions")
    predictor = model.predictor_class
    title = title_of(model)
    rows = Annotated[list[predictor.features], Field(min_length=1, max_length=max_instances)]  # type: ignore[name-defined]
    request_type = create_model(
        f"{title}BatchRequest", __base__=BatchRequest, instances=(rows, ...)
    )
    response_type = create_model(
        f"{title}BatchResponse",
        __base__=BatchResponse,
        predictions=(list[predictor.prediction], ...),  # type: ignore[name-defined]
    )
    return Endpoint(
        request_type,
        response_type,
        attrgetter("instances"),
        lambda answer, call: content_of(to_json(all_of(answer), by_alias=True), answer, call),
        f"Score rows with {model.name}",
        {"instances": [predictor.example.model_dump(mode="json", by_alias=True)]},
    )


def all_of(answer: Answer) -> Sequence[object]:
    """Its predictions, one for each of the `instances`.

    Raises:
        InvalidInput: the model could not score some of them.
    """
    if answer.errors:
        raise _refused(answer.errors, lambda row: f"instances.{row}")
    return answer.outcomes


def title_of(model: ServedModel) -> str:
    """What the names of its schemas begin with."""
    return "".join(word.capitalize() for word in model.name.split("_"))


class _Envelope:
    """The JSON of an answer around what was said, in half of the time that a serializer takes."""

    def __init__(self, model: ServedModel, field: str) -> None:
        self._model = model
        self._field = field.encode()
        self._parts: dict[str, bytes] = {}
        """The fields after the request's id, by version of the model."""

        self._now = _Clock()

    def __call__(self, said: bytes, answer: Answer, call: Call) -> bytes:
        part = self._parts.get(answer.version) or self._part(answer.version)
        ms = int((monotonic() - call.started) * 1e6) / 1000
        # What is sane as a request id needs no escapes.
        return b'{"request_id":"%b",%b,"processing_time_ms":%b,"timestamp":%b,"%b":%b}' % (
            call.request_id.encode(),
            part,
            str(ms).encode(),
            self._now(),
            self._field,
            said,
        )

    def _part(self, version: str) -> bytes:
        part = to_json({"model": self._model.name, "model_version": version})[1:-1]
        self._parts[version] = part
        return part


class _Clock:
    """The time as JSON, to the millisecond."""

    def __init__(self) -> None:
        self._at = 0
        self._text = b""

    def __call__(self) -> bytes:
        at = int(time() * 1000)
        if at != self._at:
            self._at, self._text = at, to_json(datetime.fromtimestamp(at / 1000, UTC))
        return self._text


def _refused(errors: Mapping[int, ItemError], path_of: Callable[[int], str]) -> InvalidInput:
    """The 422 that names the rows that the model could not score."""
    return invalid_fields(
        [
            FieldError(
                field=".".join(filter(None, [path_of(row), error.field])), message=error.reason
            )
            for row, error in errors.items()
        ]
    )
