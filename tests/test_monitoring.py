"""Metrics as a real Prometheus sees them, and the rules that it has for them."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import yaml

from tests.conftest import ENVIRONMENT, BakedProject, make_project
from tests.test_baked_projects import free_port

WAIT_S = 60
ROW = {
    "transaction_amount": 1250.0,
    "merchant_category": "electronics",
    "user_account_age_days": 12,
    "hour_of_day": 3,
}


@pytest.fixture(scope="module")
def project(
    template: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> BakedProject:
    if not shutil.which("promtool"):
        pytest.skip("monitoring is not tested without prometheus and promtool")
    folder = tmp_path_factory.mktemp("monitoring")
    project = make_project(template, folder, project_name="Monitored")
    shutil.copytree(artifacts, project.path / "artifacts")
    return project


def rules(project: BakedProject) -> Any:
    return yaml.safe_load(project.read("deploy/prometheus/rules.yaml"))


def test_promtool_takes_the_rules_and_they_do_what_their_tests_say(project: BakedProject) -> None:
    project.run("promtool", "check", "rules", "deploy/prometheus/rules.yaml")
    project.run("promtool", "test", "rules", "deploy/prometheus/rules_test.yaml")


def test_each_alert_is_tested_and_has_its_section_in_the_runbook(project: BakedProject) -> None:
    runbook = project.read("docs/runbook.md")
    tests = project.read("deploy/prometheus/rules_test.yaml")
    alerts = [
        rule for group in rules(project)["groups"] for rule in group["rules"] if "alert" in rule
    ]
    assert re.findall(r"^## (\w+)$", runbook, re.MULTILINE) == [rule["alert"] for rule in alerts]
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        severity = rule["labels"]["severity"].capitalize()
        section = runbook.partition(f"## {rule['alert']}\n\n")[2]
        assert section.startswith(f"**{severity}.**")
        fired = rf"alertname: {rule['alert']}\n        exp_alerts:\n"
        assert rule["alert"] == "LatencyBurnSlow" or re.search(fired, tests), rule["alert"]


def test_the_operator_gets_the_same_rules(project: BakedProject) -> None:
    path = "deploy/kubernetes/components/monitoring/prometheusrule.yaml"
    assert yaml.safe_load(project.read(path))["spec"] == rules(project)


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)["data"]

    def value(self, query: str) -> float | None:
        """Of a query that gives one number, or nothing."""
        found = self.get(f"query?{urllib.parse.urlencode({'query': query})}")["result"]
        return float(found[0]["value"][1]) if found else None


def wait(condition: Callable[[], object], log: Path) -> None:
    deadline = monotonic() + WAIT_S
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert monotonic() < deadline, log.read_text()
        sleep(0.1)


@contextmanager
def running(command: list[str], log: Path, folder: Path, **environment: str) -> Iterator[Any]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT | environment, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_S)


@pytest.fixture
def service(project: BakedProject, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Two workers: on which port, and their log."""
    port, log = free_port(), tmp_path / "service.log"
    environment = {"PORT": f"{port}", "BIND_ADDRESS": "127.0.0.1", "WEB_CONCURRENCY": "2"}
    with running([sys.executable, "-m", "app"], log, project.path, **environment):
        wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"), log)
        yield port, log


@pytest.fixture
def prometheus(
    project: BakedProject, service: tuple[int, Path], tmp_path: Path
) -> Iterator[Prometheus]:
    """It scrapes the service four times a second, under the name that the rules know."""
    port, _ = service
    own_port, log = free_port(), tmp_path / "prometheus.log"
    config = {
        "global": {"scrape_interval": "250ms", "evaluation_interval": "1s"},
        "rule_files": [str(project.path / "deploy/prometheus/rules.yaml")],
        "scrape_configs": [
            {"job_name": "monitored", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        ],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = ["prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address=127.0.0.1:{own_port}"]
    with running(command, log, tmp_path):
        prometheus = Prometheus(own_port)
        wait(lambda: prometheus.value('up{job="monitored"}') == 1, log)
        yield prometheus


def send(port: int, count: int) -> Counter[int]:
    """Requests of several kinds, each on a connection of its own; the statuses of the answers."""
    chance = random.Random(count)  # noqa: S311
    statuses: Counter[int] = Counter()
    for number in range(count):
        row = ROW | {"transaction_amount": float(chance.randint(1, 50))}
        if number % 10 == 0:
            row["hour_of_day"] = 25
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        body = json.dumps({"features": row})
        connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
        statuses[connection.getresponse().status] += 1
        connection.close()
    return statuses


def test_prometheus_counts_what_was_sent_and_workers_that_die_take_nothing_back(
    service: tuple[int, Path], prometheus: Prometheus
) -> None:
    port, log = service
    sent: Counter[int] = Counter()
    for times in range(1, 4):
        sent += send(port, 300)
        for status, count in sent.items():
            query = f'sum(http_requests_total{{job="monitored",status="{status}"}})'
            wait(lambda: prometheus.value(query) == count, log)  # noqa: B023
        booted = re.findall(r"Booting worker with pid: (\d+)", log.read_text())
        os.kill(int(booted[-1]), signal.SIGKILL)
        wait(lambda: log.read_text().count('"model ready"') == 2 + times, log)  # noqa: B023
    for metric in ("http_requests_total", "inference_requests_total", "cache_misses_total"):
        assert prometheus.value(f'sum(resets({metric}{{job="monitored"}}[5m]))') == 0
    outcomes = prometheus.value('sum(inference_requests_total{job="monitored",outcome="ok"})')
    assert outcomes == sent[200]
    rows = prometheus.value(
        'sum(cache_misses_total{job="monitored"}) + sum(cache_hits_total{job="monitored"})'
    )
    assert rows == sent[200]


def test_every_rule_can_be_evaluated_and_promtool_takes_the_metrics(
    service: tuple[int, Path], prometheus: Prometheus
) -> None:
    port, log = service
    send(port, 50)
    found: list[Any] = []

    def are_evaluated() -> bool:
        groups = prometheus.get("rules")["groups"]
        found[:] = [rule for group in groups for rule in group["rules"]]
        return bool(found) and all(rule["health"] != "unknown" for rule in found)

    wait(are_evaluated, log)
    assert [rule["name"] for rule in found if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in found if rule.get("state") == "firing"] == []
    # An evaluation before the second scrape gives nothing.
    errors = 'job:http_request_errors:ratio_rate5m{job="monitored"}'
    wait(lambda: prometheus.value(errors) == 0, log)
    slow = 'job:http_requests_slow:ratio_rate5m{job="monitored"}'
    wait(lambda: prometheus.value(slow) is not None, log)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        metrics = answer.read()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
