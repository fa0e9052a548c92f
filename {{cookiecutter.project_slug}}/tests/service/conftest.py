"""For tests of the service itself: server processes with models made for the purpose."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.redis_server import RedisServer, StartRedis
from tests.service.server import FAKES, Service, Start, publish


@pytest.fixture(scope="session")
def fake_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the predictors beside this file."""
    directory = tmp_path_factory.mktemp("artifacts")
    publish(directory, "double", factor_txt=b"2")
    publish(directory, "gate", none=b"")
    publish(directory, "faulty", none=b"")
    return directory


@pytest.fixture
def start(fake_artifacts: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a service with the fake models and the given settings; stops it afterwards."""
    running: list[Service] = []

    def start(**settings: object) -> Service:
        defaults = {
            "PREDICTORS_DIR": FAKES,
            "ARTIFACTS_DIR": fake_artifacts,
            "DEFAULT_MODEL": "double",
        }
        environment = {name: str(value) for name, value in (defaults | settings).items()}
        running.append(Service(tmp_path / f"service-{len(running)}.log", environment))
        return running[-1]

    yield start
    for service in running:
        service.close()


@pytest.fixture(scope="module")
def service(fake_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service with the fake models, for tests that do not change it."""
    environment = {
        "PREDICTORS_DIR": str(FAKES),
        "ARTIFACTS_DIR": str(fake_artifacts),
        "DEFAULT_MODEL": "double",
        "MAX_BODY_BYTES": "20000",
        "MAX_INSTANCES": "10",
        "READY_CACHE_S": "0",
        # Above what a request may take here; `test_timeouts` sets its own.
        "REQUEST_TIMEOUT_S": "25",
    }
    service = Service(tmp_path_factory.mktemp("service") / "log", environment)
    try:
        yield service.wait_for("/ready")
    finally:
        service.close()


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe that holds the `gate` model until something is written into it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[StartRedis]:
    running: list[RedisServer] = []

    def start(options: str = "") -> RedisServer:
        running.append(RedisServer(tmp_path, options))
        return running[-1].start()

    yield start
    for server in running:
        server.client.close()
        server.kill()


@pytest.fixture
def redis_url(start_redis: StartRedis) -> str:
    """Of any Redis: that of REDIS_URL, which is left as it is but for new keys, or one started."""
    return os.environ.get("REDIS_URL") or start_redis().url
