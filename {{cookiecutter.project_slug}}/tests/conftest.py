"""For tests of your predictors: the service, in this process."""

from collections.abc import Iterator
from time import monotonic

import pytest
from fastapi.testclient import TestClient

from app.main import create_app

LOAD_TIMEOUT_S = 120


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    """Asks the service, without a network; its models are loaded."""
    with TestClient(create_app()) as client:
        deadline = monotonic() + LOAD_TIMEOUT_S
        while (answer := client.get("/startup")).status_code != 200:
            assert answer.json()["status"] == "loading", "the models cannot be loaded"
            assert monotonic() < deadline, "the models are not loaded yet"
        yield client
