"""The service, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from app.access_log import AccessLog
from app.api.instrumentation import METRICS, instrument
from app.api.keys import ApiKeys, RequireApiKey
from app.api.middleware import RequestContext
from app.api.models import add_model_routes
from app.api.observers import Observers
from app.api.openapi import document
from app.api.platforms import add_platform_routes
from app.api.predict import PredictionRoutes, add_predict_routes
from app.api.probes import PROBES, add_probe_routes
from app.api.problems import use_problem_details
from app.api.status_page import add_status_page
from app.lifecycle import Lifecycle
from app.logs import current_ids
from app.repository import ModelRepository
from app.settings import Settings, load_settings

if TYPE_CHECKING:
    from app.tracing import Tracing


def create_app(settings: Settings | None = None) -> RequestContext:
    """The ASGI application; its models are loaded when its lifespan begins.

    What every request goes through is around FastAPI and not in it: a prediction never gets
    there, unless it is for no path that there is.

    Raises:
        StartupError: the settings or a predictor file are wrong.
    """
    settings = settings or load_settings()
    tracing = _tracing(settings)
    repository = ModelRepository(settings, tracing)
    lifecycle = Lifecycle(repository, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        lifecycle.start()
        yield
        await lifecycle.stop()
        if tracing:
            tracing.close()

    app = FastAPI(
        title=settings.service_title,
        description=settings.service_description,
        version="1",
        lifespan=lifespan,
        # A redirect would be made from the Host header, which anybody can write.
        redirect_slashes=False,
        # Every request is traced by what is around it, and validation errors hold what was sent.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )

    keys = ApiKeys(settings.api_keys_sha256)
    routes = PredictionRoutes(app, settings, keys)
    add_predict_routes(app, routes, repository)
    add_model_routes(app, repository)
    add_probe_routes(app, lifecycle)
    probes = {*PROBES, *add_platform_routes(app, routes, lifecycle)}
    if settings.status_page:
        add_status_page(app, routes, lifecycle)
    use_problem_details(app)

    def needs_key(path: str) -> bool:
        # A platform may have its paths anywhere.
        return path in routes.by_path or (path.startswith("/v1/") and path not in probes)

    document(app, needs_key if settings.api_keys_sha256 else None)
    app.add_middleware(RequireApiKey, keys=keys, needs_key=needs_key)
    instrument(app, probes)
    observers = Observers(AccessLog(settings), tracing, frozenset((*probes, METRICS)))
    return RequestContext(app, routes.by_path, lifecycle, observers)


def _tracing(settings: Settings) -> "Tracing | None":
    """None: no traces are wanted."""
    endpoint = settings.otel_exporter_otlp_endpoint
    if not endpoint:
        return None
    from app.tracing import Tracing, current_trace_id  # noqa: PLC0415

    current_ids["trace_id"] = current_trace_id
    return Tracing(endpoint, settings.service_title)
