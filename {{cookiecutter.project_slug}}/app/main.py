"""The service, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import metrics
from app.api.middleware import ApiKeys, RequestContext
from app.api.models import add_model_routes
from app.api.openapi import document
from app.api.predict import add_predict_routes
from app.api.probes import add_probe_routes
from app.api.problems import use_problem_details
from app.lifecycle import Lifecycle
from app.repository import ModelRepository
from app.settings import Settings, load_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; its models are loaded when its lifespan begins.

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
    app.state.settings = settings
    app.state.lifecycle = lifecycle

    add_predict_routes(app, repository, settings.max_instances)
    add_model_routes(app, repository)
    add_probe_routes(app, lifecycle)
    use_problem_details(app)
    document(app, needs_api_key=bool(settings.api_keys_sha256))

    # The last one added is the outermost.
    if settings.api_keys_sha256:
        app.add_middleware(ApiKeys, digests=settings.api_keys_sha256)
    metrics.instrument(app)
    app.add_middleware(RequestContext, lifecycle=lifecycle)
    return app
