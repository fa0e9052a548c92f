"""The service, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app.api.instrumentation import instrument
from app.api.keys import ApiKeys, RequireApiKey
from app.api.middleware import RequestContext
from app.api.models import add_model_routes
from app.api.openapi import document
from app.api.predict import add_predict_routes
from app.api.probes import add_probe_routes
from app.api.problems import use_problem_details
from app.lifecycle import Lifecycle
from app.logs import AccessLog
from app.repository import ModelRepository
from app.settings import Settings, load_settings


def create_app(settings: Settings | None = None) -> RequestContext:
    """The ASGI application; its models are loaded when its lifespan begins.

    What every request goes through is around FastAPI and not in it: a prediction never gets
    there, unless it is for no path that there is.

    Raises:
        StartupError: the settings or a predictor file are wrong.
    """
    settings = settings or load_settings()
    repository = ModelRepository(settings)
    lifecycle = Lifecycle(repository, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        lifecycle.start()
        yield
        await lifecycle.stop()

    app = FastAPI(
        title=settings.service_title,
        description=settings.service_description,
        version="1",
        lifespan=lifespan,
        # A redirect would be made from the Host header, which anybody can write.
        redirect_slashes=False,
    )

    keys = ApiKeys(settings.api_keys_sha256)
    direct = add_predict_routes(app, repository, settings, keys)
    add_model_routes(app, repository)
    add_probe_routes(app, lifecycle)
    use_problem_details(app)
    document(app, needs_api_key=bool(settings.api_keys_sha256))

    app.add_middleware(RequireApiKey, keys=keys)
    instrument(app)
    routes = {route.path: route for route in direct}
    return RequestContext(app, routes, lifecycle, AccessLog(settings))
