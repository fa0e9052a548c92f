"""`compose.yaml`: the service, a Redis that keeps what it has answered, and a screen.

Grafana alone does not run here, as Debian has no package of it. What it is given is checked for
what it refers to; the dashboard itself is looked at in test_dashboard.py.
"""

import http.client
import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import yaml

from tests.conftest import TEMPLATE, BakedProject, make_project
from tests.containers import Containers
from tests.test_baked_projects import free_port
from tests.test_image import EXAMPLE

WAIT_S = 60


@pytest.fixture
def project(
    template: Path, artifacts: Path, tmp_path: Path, containers: Containers
) -> Iterator[BakedProject]:
    """Up, with the Redis of this Debian, on the only network that there is here: the host's."""
    project = make_project(template, tmp_path, project_name="Compose Test")
    shutil.copytree(artifacts, project.path / "artifacts")
    services = yaml.safe_load(project.read("compose.yaml"))["services"]
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", project.read("Dockerfile"), re.MULTILINE)
    containers.make_valkey(base, services["redis"]["image"])
    containers.make_prometheus(base, services["prometheus"]["image"])
    port, redis_port, prometheus_port = free_port(), free_port(), free_port()
    here = {"PORT": f"{port}", "BIND_ADDRESS": "127.0.0.1"}
    here["REDIS_URL"] = services["service"]["environment"]["REDIS_URL"].replace(
        "//redis:6379", f"//127.0.0.1:{redis_port}"
    )
    listen = ["--bind", "127.0.0.1", "--port", f"{redis_port}"]
    config = project.read("deploy/prometheus/prometheus.yaml")
    project.write(
        "deploy/prometheus/prometheus.yaml", config.replace("service:8080", f"127.0.0.1:{port}")
    )
    listen_there = f"--web.listen-address=127.0.0.1:{prometheus_port}"
    override = {
        "service": {"network_mode": "host", "environment": here},
        "redis": {"network_mode": "host", "command": [*services["redis"]["command"], *listen]},
        "prometheus": {
            "network_mode": "host",
            "command": [*services["prometheus"]["command"], listen_there],
        },
    }
    project.write("here.yaml", yaml.safe_dump({"services": override}))
    project.write("port", f"{port}")
    project.write("prometheus_port", f"{prometheus_port}")
    files = ["--file", "compose.yaml", "--file", "here.yaml"]
    containers.compose(project.path, *files, "up", "--build", "--detach", *override)
    try:
        yield project
    finally:
        containers.compose(project.path, *files, "down", "--volumes")


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


def targets(project: BakedProject) -> list[Any]:
    """What Prometheus scrapes, once it has."""
    url = f"http://127.0.0.1:{project.read('prometheus_port')}/api/v1/targets"
    deadline = monotonic() + WAIT_S
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                found: list[Any] = json.load(answer)["data"]["activeTargets"]
            if any(target["health"] == "up" for target in found):
                return found
        except OSError:
            pass
        assert monotonic() < deadline
        sleep(0.1)


def test_prometheus_watches_and_what_was_answered_before_a_restart_is_known_after_it(
    project: BakedProject, containers: Containers
) -> None:
    port = int(project.read("port"))
    cache, score = ask(port)
    assert cache == "miss"
    [target] = targets(project)
    assert target["labels"]["job"] == "compose-test"
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


@pytest.fixture(scope="module")
def files(template: Path, tmp_path_factory: pytest.TempPathFactory) -> BakedProject:
    """Not to be run."""
    return make_project(template, tmp_path_factory.mktemp("files"), project_name="Compose Test")


@pytest.fixture(scope="module")
def services(files: BakedProject) -> Any:
    return yaml.safe_load(files.read("compose.yaml"))["services"]


def test_its_services_may_do_no_more_than_they_need(services: Any) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":v?\d+\.\d+", service.get("image", ":0.0")), name
        if name != "service":
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def mounts(service: Any) -> dict[str, str]:
    """By the path in the container, that of the project."""
    pairs = [volume.split(":") for volume in service["volumes"]]
    assert all(options == ["ro"] for source, _, *options in pairs if source.startswith("./"))
    return {target: source for source, target, *_ in pairs if source.startswith("./")}


def test_what_grafana_is_given_is_there(files: BakedProject, services: Any) -> None:
    mounted = mounts(services["grafana"])
    assert all((files.path / source).exists() for source in mounted.values())
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    dashboard = json.loads(files.read(mounted[home]))
    provisioning = files.path / mounted["/etc/grafana/provisioning"]
    [provider] = yaml.safe_load((provisioning / "dashboards/dashboards.yaml").read_text())[
        "providers"
    ]
    assert Path(home).parent == Path(provider["options"]["path"])
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    types = [
        entry["query"] for entry in dashboard["templating"]["list"] if entry["name"] == "datasource"
    ]
    assert types == [source["type"]]
    assert source["isDefault"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"][0].endswith(":9090")
    config = yaml.safe_load(files.read("deploy/prometheus/prometheus.yaml"))
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_nobody_logs_in_to_grafana_and_it_calls_nobody(services: Any) -> None:
    environment = services["grafana"]["environment"]
    on = {name for name, value in environment.items() if value == "true"}
    off = {name for name, value in environment.items() if value == "false"}
    assert on == {
        "GF_AUTH_ANONYMOUS_ENABLED",
        "GF_AUTH_DISABLE_LOGIN_FORM",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION",
        "GF_PLUGINS_PREINSTALL_DISABLED",
        "GF_PLUGINS_PUBLIC_KEY_RETRIEVAL_DISABLED",
    }
    assert off == {
        "GF_AUTH_BASIC_ENABLED",
        "GF_ANALYTICS_REPORTING_ENABLED",
        "GF_ANALYTICS_CHECK_FOR_UPDATES",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES",
        "GF_NEWS_NEWS_FEED_ENABLED",
    }
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
