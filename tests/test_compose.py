"""`compose.yaml`: the service and a Redis that keeps what it has answered."""

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
import yaml

from tests.conftest import TEMPLATE, BakedProject, make_project
from tests.containers import Containers
from tests.test_baked_projects import free_port
from tests.test_image import EXAMPLE

WAIT_S = 60


@pytest.fixture
def project(template: Path, tmp_path: Path, containers: Containers) -> Iterator[BakedProject]:
    """Up, with the Redis of this Debian, on the only network that there is here: the host's."""
    project = make_project(template, tmp_path, "Compose Test")
    project.run("python", "-m", "training.fraud")
    services = yaml.safe_load(project.read("compose.yaml"))["services"]
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", project.read("Dockerfile"), re.MULTILINE)
    containers.make_valkey(base, services["redis"]["image"])
    port, redis_port = free_port(), free_port()
    here = {"PORT": f"{port}", "BIND_ADDRESS": "127.0.0.1"}
    here["REDIS_URL"] = services["service"]["environment"]["REDIS_URL"].replace(
        "//redis:6379", f"//127.0.0.1:{redis_port}"
    )
    listen = ["--bind", "127.0.0.1", "--port", f"{redis_port}"]
    override = {
        "service": {"network_mode": "host", "environment": here},
        "redis": {"network_mode": "host", "command": [*services["redis"]["command"], *listen]},
    }
    project.write("here.yaml", yaml.safe_dump({"services": override}))
    project.write("port", f"{port}")
    files = ["--file", "compose.yaml", "--file", "here.yaml"]
    containers.compose(project.path, *files, "up", "--build", "--detach")
    try:
        yield project
    finally:
        containers.compose(project.path, *files, "down")


def ask(port: int) -> tuple[str | None, float]:
    """What the cache said, and the score; it waits for the service."""
    deadline = monotonic() + WAIT_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/predict", EXAMPLE, headers)
            answer = connection.getresponse()
            if answer.status == 200:
                score = json.load(answer)["prediction"]["fraud_probability"]
                return answer.headers["X-Cache"], score
        except OSError:
            pass
        finally:
            connection.close()
        assert monotonic() < deadline
        sleep(0.1)


def test_what_was_answered_before_a_restart_is_known_after_it(
    project: BakedProject, containers: Containers
) -> None:
    port = int(project.read("port"))
    cache, score = ask(port)
    assert cache == "miss"
    [name] = re.findall(r"\S*service\S*", containers.podman("ps", "--format", "{{.Names}}"))
    containers.podman("restart", "--time", "35", name)
    assert ask(port) == ("hit", score)


def test_its_redis_is_the_one_of_the_cluster() -> None:
    deployment = (TEMPLATE / "deploy/kubernetes/components/redis/deployment.yaml").read_text()
    compose = yaml.safe_load((TEMPLATE / "compose.yaml").read_text())["services"]["redis"]
    [image] = re.findall(r"image: (\S+)", deployment)
    listed = re.findall(r"^            - (.*)$", deployment.partition("command:")[2], re.MULTILINE)
    command = [yaml.safe_load(word) for word in listed]
    assert compose["image"] == image
    assert command[: len(compose["command"])] == compose["command"]
