"""The dashboard: a real Prometheus has an answer to each of its queries, and Grafana its form."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml

from benchmarks.redis_server import redis_server
from tests.conftest import REPOSITORY, TEMPLATE, BakedProject, make_project
from tests.containers import run
from tests.test_baked_projects import free_port
from tests.test_monitoring import ROW, Prometheus, running, send, wait

PATIENCE_S = 20
MAX_INSTANCES = 1000
"""Most rows of a request."""

POD = "monitored-7d9c5b8f6-x2k4q"
EXPORTED = (REPOSITORY / "tests/exporters.prom").read_text(encoding="utf-8")
"""What the exporters of a cluster say of this pod and of another's, in their words."""

METRIC = r"([a-zA-Z_:][\w:]*)\{"
VALUES = {
    "__rate_interval": "1m",
    "__range": "5m",
    "job": "monitored",
    "namespace": ".*",
    "model": ".*",
    "field": "prediction.fraud_probability",
}
"""What Grafana puts in for its variables, and for ours where nothing is chosen."""

OF_EXPORTERS = set(re.findall(METRIC, EXPORTED))
OF_PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
"""Of a service of one process."""
OF_REDIS = {"cache_redis_lookup_seconds_bucket", "cache_redis_breaker_state"}


@pytest.fixture(scope="module")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> BakedProject:
    return make_project(template, tmp_path_factory.mktemp("dashboard"), project_name="Monitored")


@pytest.fixture(scope="module")
def dashboard(project: BakedProject) -> Any:
    return json.loads(project.read("deploy/grafana/dashboard.json"))


@pytest.fixture(scope="module")
def panels(dashboard: Any) -> dict[str, Any]:
    return {panel["title"]: panel for panel in dashboard["panels"] if panel["type"] != "row"}


@pytest.fixture(scope="module")
def expressions(panels: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels.values() for target in panel["targets"]]


@pytest.fixture(scope="module")
def rules(project: BakedProject) -> Any:
    """By name."""
    groups = yaml.safe_load(project.read("deploy/prometheus/rules.yaml"))["groups"]
    return {
        rule.get("alert") or rule["record"]: rule for group in groups for rule in group["rules"]
    }


def filled(text: str) -> str:
    """As Grafana sends it."""
    return re.sub(r"\$([a-z_]+)", lambda found: VALUES[found[1]], text)


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(METRIC, expression))


def test_it_is_the_projects_own(dashboard: Any) -> None:
    """Services share a Grafana, which knows dashboards by `uid`."""
    assert (dashboard["uid"], dashboard["title"]) == ("monitored", "Monitored")
    [job] = [entry for entry in dashboard["templating"]["list"] if entry["name"] == "job"]
    assert job["current"]["value"] == "monitored"


def test_its_metrics_are_those_of_the_service_and_of_known_exporters(
    expressions: list[str], rules: Any
) -> None:
    source = (TEMPLATE / "app/metrics.py").read_text(encoding="utf-8")
    known = {"up", *OF_PROCESS, *OF_EXPORTERS, *rules}
    for kind, name in re.findall(r'(Counter|Gauge|Histogram)\(\s*"(\w+)"', source):
        suffixes = ("_bucket", "_sum", "_count") if kind == "Histogram" else ("",)
        known |= {name + suffix for suffix in suffixes}
    for expression in expressions:
        assert metrics_of(expression)
        assert metrics_of(expression) <= known, expression


def test_panels_lie_side_by_side_and_say_what_they_show(dashboard: Any) -> None:
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in everything:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in everything], 2):
        apart = [
            one[start] + one[size] <= other[start] or other[start] + other[size] <= one[start]
            for start, size in (("x", "w"), ("y", "h"))
        ]
        assert any(apart), (one, other)
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in everything) <= 32
    rows = [panel["title"] for panel in everything if panel["type"] == "row"]
    assert len(rows) == 4
    assert all(row.endswith("?") for row in rows)


def test_each_panel_has_a_unit_and_each_alert_a_panel(
    panels: dict[str, Any], project: BakedProject, rules: Any
) -> None:
    alerts = {name for name, rule in rules.items() if "alert" in rule}
    runbook = set(re.findall(r"^## (\w+)$", project.read("docs/runbook.md"), re.MULTILINE))
    named: set[str] = set()
    for panel in panels.values():
        assert panel["fieldConfig"]["defaults"]["unit"]
        says, _, sections = panel["description"].partition(" Runbook: ")
        assert len(says) > 20
        named |= set(re.findall(r"\w+", sections))
    assert named <= runbook
    assert alerts <= named


def test_its_lines_are_those_of_the_objectives_and_alerts(
    panels: dict[str, Any], rules: Any
) -> None:
    def lines(title: str) -> list[float]:
        return [
            step["value"]
            for step in panels[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        ][1:]

    def bounds(alert: str) -> list[tuple[float, float]]:
        found = re.findall(r"> ([\d.]+) \* ([\d.]+)", rules[alert]["expr"])
        return [(float(factor), float(budget)) for factor, budget in found]

    factor, budget = bounds("ErrorsBurnFast")[0]
    assert lines("Errors of ours") == pytest.approx([budget, factor * budget])
    assert lines("Without an error of ours") == pytest.approx([1 - budget])
    assert lines("Within half a second") == pytest.approx([1 - bounds("LatencyBurnFast")[0][1]])
    slow = rules["job:http_requests_slow:ratio_rate5m"]["expr"]
    assert lines("How long answers take") == [float(*re.findall(r'le="(.*?)"', slow))]
    assert lines("Refused") == [float(rules["Rejections"]["expr"].rpartition("> ")[2])]
    [full_batches] = re.findall(
        r"> (\d+) \* inference_batch_max_rows", rules["QueueSaturated"]["expr"]
    )
    assert panels["Rows that wait"]["targets"][1]["expr"].startswith(f"{full_batches} * min")


class Exporters(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(EXPORTED.replace("SECONDS", str(monotonic())).encode())

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextmanager
def exporters() -> Iterator[int]:
    """On which port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exporters)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def service(project: BakedProject, log: Path, **environment: str) -> Iterator[int]:
    """On which port. No more waits than one request may have."""
    port = free_port()
    own = {"PORT": f"{port}", "BIND_ADDRESS": "127.0.0.1", "QUEUE_MAX_ROWS": f"{MAX_INSTANCES}"}
    with running([sys.executable, "-m", "app"], log, project.path, **own, **environment):
        wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"), log)
        yield port


@contextmanager
def prometheus(
    project: BakedProject, folder: Path, scrape_configs: list[Any]
) -> Iterator[Prometheus]:
    port, log = free_port(), folder / "prometheus.log"
    config = {
        "global": {"scrape_interval": "250ms", "evaluation_interval": "1s"},
        "rule_files": [str(project.path / "deploy/prometheus/rules.yaml")],
        "scrape_configs": scrape_configs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = ["prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with running(command, log, folder):
        prometheus = Prometheus(port)
        wait(lambda: prometheus.value('up{job="monitored"}') == 1, log)
        yield prometheus


@pytest.fixture(scope="module")
def trained(project: BakedProject, artifacts: Path) -> BakedProject:
    if not shutil.which("prometheus"):
        pytest.skip("the dashboard is not tested without prometheus")
    shutil.copytree(artifacts, project.path / "artifacts")
    return project


def test_promtool_takes_the_configuration_for_compose(trained: BakedProject) -> None:
    trained.run("promtool", "check", "config", "deploy/prometheus/prometheus.yaml")


def scraping(name: str, port: int, **labels: str) -> Any:
    return {
        "job_name": name,
        "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": labels}],
    }


@pytest.fixture(scope="module")
def in_a_cluster(
    trained: BakedProject, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Prometheus]]:
    """Two workers and a Redis, scraped as a PodMonitor has it, beside exporters."""
    folder = tmp_path_factory.mktemp("cluster")
    log = folder / "service.log"
    with (
        redis_server(list(os.sched_getaffinity(0))) as redis,
        exporters() as others,
        service(trained, log, WEB_CONCURRENCY="2", REDIS_URL=redis.url) as port,
    ):
        scrape_configs = [
            scraping("monitored", port, namespace="production", pod=POD, container="service"),
            scraping("exporters", others) | {"honor_labels": True},
            # As NVIDIA's operator has it: the labels of the pod become `exported_pod` and so on.
            scraping("dcgm", others, namespace="gpu-operator", pod="dcgm-exporter-r7x2m"),
        ]
        with prometheus(trained, folder, scrape_configs) as found:
            yield port, found


@pytest.fixture
def in_compose(trained: BakedProject, tmp_path: Path) -> Iterator[tuple[int, Prometheus]]:
    """One worker, scraped as compose.yaml has it; nothing but the service."""
    config = yaml.safe_load(trained.read("deploy/prometheus/prometheus.yaml"))
    [scrape_config] = config["scrape_configs"]
    with (
        service(trained, tmp_path / "service.log") as port,
        prometheus(trained, tmp_path, [scraping(scrape_config["job_name"], port)]) as found,
    ):
        yield port, found


def send_too_much(port: int) -> None:
    """At once more than may wait; every row is another."""

    def ask(number: int) -> None:
        rows = [
            ROW | {"transaction_amount": float(number), "user_account_age_days": age}
            for age in range(MAX_INSTANCES)
        ]
        body = json.dumps({"instances": rows}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/predict/batch", body, {"Content-Type": "application/json"}
        )
        with suppress(HTTPError), urllib.request.urlopen(request):
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))


def has_data(prometheus: Prometheus, expression: str) -> bool:
    """And not NaN alone; a query that is none raises."""
    query = urllib.parse.urlencode({"query": filled(expression)})
    found = prometheus.get(f"query?{query}")["result"]
    return any(math.isfinite(float(entry["value"][1])) for entry in found)


def without_data(port: int, prometheus: Prometheus, expressions: list[str]) -> set[str]:
    """Those of them that find nothing under load, when all others do."""
    left = set(expressions)
    deadline = monotonic() + PATIENCE_S
    while left and monotonic() < deadline:
        send(port, 20)
        send_too_much(port)
        left = {expression for expression in left if not has_data(prometheus, expression)}
        sleep(0.1)
    return left


def are_there(expressions: list[str], missing: set[str]) -> list[str]:
    """Those with an alternative that needs none of the metrics that are missing."""
    return [
        expression
        for expression in expressions
        if any(not metrics_of(part) & missing for part in expression.split(" or "))
    ]


def test_each_query_finds_something_in_a_cluster(
    in_a_cluster: tuple[int, Prometheus], expressions: list[str], panels: dict[str, Any]
) -> None:
    port, prometheus = in_a_cluster
    there = are_there(expressions, OF_PROCESS)
    assert without_data(port, prometheus, there) == set()
    for expression in set(expressions) - set(there):
        assert not has_data(prometheus, expression)
    # Those of its own pods alone, and of its GPUs whichever way the exporter's labels come.
    memory = panels["Memory"]["targets"][0]["expr"]
    assert prometheus.value(f"sum({filled(memory)})") == 3e8
    gpu = panels["GPU"]["targets"][0]["expr"]
    assert prometheus.value(f"sum({filled(gpu)})") == 80
    for way in re.findall(r"DCGM\w+\{.*?\}", gpu):
        assert has_data(prometheus, way), way


def test_each_query_of_the_service_finds_something_in_compose(
    in_compose: tuple[int, Prometheus], expressions: list[str]
) -> None:
    port, prometheus = in_compose
    there = are_there(expressions, OF_EXPORTERS | OF_REDIS)
    assert len(there) > len(expressions) / 2
    assert without_data(port, prometheus, there) == set()


def test_there_is_something_to_choose(in_a_cluster: tuple[int, Prometheus], dashboard: Any) -> None:
    port, prometheus = in_a_cluster
    send(port, 1)
    chosen = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found
        match = urllib.parse.urlencode({"match[]": filled(found[1])})
        chosen[variable["name"]] = prometheus.get(f"label/{found[2]}/values?{match}")
    # The training leaves the hour out.
    fields = [f"features.{name}" for name in ROW if name != "hour_of_day"]
    predicted = ("confidence", "fraud_probability", "is_fraud")
    fields += [f"prediction.{name}" for name in predicted]
    assert chosen.pop("field") == sorted(fields)
    assert chosen == {"job": ["monitored"], "namespace": ["production"], "model": ["fraud"]}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    """A folder with the types that Grafana publishes, and a compiler for them."""
    if not shutil.which("npm"):
        pytest.skip("the form of the dashboard is not checked without npm")
    folder = tmp_path / "schema"
    shutil.copytree(REPOSITORY / "tests/grafana_schema", folder)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=folder)
    return folder


def check(schema: Path, dashboard: Any) -> subprocess.CompletedProcess[str]:
    source = 'import type { OurDashboard } from "./schema";\n'
    source += f"export const dashboard: OurDashboard = {json.dumps(dashboard)};\n"
    (schema / "dashboard.ts").write_text(source)
    return subprocess.run(
        ["node_modules/.bin/tsc", "--project", "."],
        cwd=schema,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_has_the_form_that_grafana_knows(schema: Path, dashboard: Any) -> None:
    done = check(schema, dashboard)
    assert done.returncode == 0, done.stdout
    # That it can tell: a name that is none, and a value that is none.
    changes: list[dict[str, Any]] = [{"panel": []}, {"graphTooltip": 7}]
    for change in changes:
        assert check(schema, dashboard | change).returncode != 0, change
