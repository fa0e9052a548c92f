"""Alerts that are brought about on purpose: `make bench-alerts`.

Services with a fault each run side by side, and one without. A real Prometheus scrapes them, with
the rules as they are, waiting times included, so it takes a quarter of an hour. Each is a
namespace of its own. Traffic is a few requests a second to this machine; only processes that
were started here are ended, some of them on purpose.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

import yaml

from benchmarks.contestants import Command
from benchmarks.environments import BUILD, REPOSITORY
from benchmarks.machine import commit
from benchmarks.redis_server import RedisProcess, redis_server
from benchmarks.report import table
from benchmarks.serving import Server, descendants, free_port, shared_cores, status

SLUG = "watched"
FOLDER = BUILD / "alerts"
PROJECT = FOLDER / SLUG
PATIENCE_S = 18 * 60
CPUS = shared_cores().server

SLOW = "time.sleep(0.8)"
BUSY = "time.sleep(0.05 * len(batch))"
BROKEN = "raise ValueError(batch[0].transaction_amount)"


def payment(chance: random.Random, factor: float = 1.0) -> dict[str, Any]:
    """Like those of the training, of all hours of a day, with amounts `factor` times as large."""
    categories = ["electronics", "grocery", "restaurant", "travel", "other"]
    return {
        "transaction_amount": min(factor * 50 * chance.lognormvariate(0, 1.2) + 0.01, 999_999),
        "merchant_category": chance.choices(categories, [0.15, 0.35, 0.25, 0.1, 0.15])[0],
        "user_account_age_days": int(min(chance.expovariate(1 / 700), 36_500)),
        "hour_of_day": chance.randrange(24),
    }


@dataclass
class Scenario:
    """A service, what is wrong with it, and who is to be woken."""

    name: str
    wrong: str
    alerts: set[str]
    """Those that have to come."""

    also: set[str] = field(default_factory=set)
    """Those that may, as the fault brings them about, too."""

    per_s: float = 5
    callers: int = 1
    """Each sends `per_s` requests a second, or as many as are answered."""

    factor: float = 1.0
    predict: str = ""
    """What the model does before it answers."""

    environment: dict[str, str] = field(default_factory=dict)
    act: Callable[[Server, RedisProcess, Event], None] | None = None
    """What is done to it while it runs, until the event."""


def kill_workers(server: Server, _: RedisProcess, is_over: Event) -> None:
    while not is_over.wait(20):
        for pid in descendants(server.process.pid)[:1]:
            os.kill(pid, signal.SIGKILL)


def stop_redis(_: Server, redis: RedisProcess, is_over: Event) -> None:
    is_over.wait(20)
    redis.kill()


def stop_service(server: Server, _: RedisProcess, is_over: Event) -> None:
    is_over.wait(20)
    server.stop()


def scenarios(redis_url: str) -> list[Scenario]:
    burning = {"LatencyBurnFast", "LatencyBurnSlow"}
    failing = {"ErrorsBurnFast", "ErrorsBurnSlow"}
    return [
        Scenario("well", "nothing", set()),
        Scenario("slow-model", "the model takes 0.8 s", burning, predict=SLOW),
        Scenario("broken-model", "the model raises", failing, predict=BROKEN),
        Scenario(
            "overload",
            "64 callers at once, for a model that takes 50 ms for a row",
            {"Rejections", "QueueSaturated"},
            also=burning | failing,
            callers=64,
            predict=BUSY,
            environment={
                "QUEUE_MAX_ROWS": "40",
                "MAX_INSTANCES": "40",
                "BATCH_MAX_ROWS": "8",
                "REQUEST_TIMEOUT_S": "25",
            },
        ),
        Scenario(
            "broken-cache",
            "its Redis was killed",
            {"RedisLeftAlone"},
            environment={"REDIS_URL": redis_url},
            act=stop_redis,
        ),
        Scenario("drift", "amounts are ten times as large", {"Drift"}, factor=10),
        Scenario(
            "cpu-fallback",
            "a GPU is expected, and the model runs on the CPU",
            {"CpuInsteadOfGpu"},
            environment={"NVIDIA_VISIBLE_DEVICES": "all"},
        ),
        Scenario(
            "restarts",
            "one of two workers is killed every 20 s",
            {"Restarts"},
            also=failing,
            environment={"WEB_CONCURRENCY": "2"},
            act=kill_workers,
        ),
        Scenario("gone", "it was stopped", {"TargetAbsent"}, act=stop_service),
    ]


def make_project() -> None:
    """One for all, trained; each scenario has a predictor of its own."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    bake = [sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", str(FOLDER)]
    for command, folder in (
        ([*bake, str(REPOSITORY), f"project_name={SLUG}"], FOLDER),
        ([sys.executable, "-m", "training.fraud"], PROJECT),
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def command(scenario: Scenario, port: int) -> Command:
    folder = FOLDER / "predictors" / scenario.name
    folder.mkdir(parents=True)
    source = (PROJECT / "predictors" / "fraud.py").read_text()
    if scenario.predict:
        head = "    def predict(self, batch: list[Features]) -> list[Prediction]:\n"
        # Not in the warm-up, which has to go well.
        wrong = f"        if batch[0] != self.example:\n            {scenario.predict}\n"
        source = "import time\n" + source.replace(head, head + wrong)
        source = source.replace("    example = ", "    runs_inline = False\n    example = ")
    (folder / "fraud.py").write_text(source)
    environment = {
        "PORT": f"{port}",
        "BIND_ADDRESS": "127.0.0.1",
        "PREDICTORS_DIR": str(folder),
        "PYTHONPYCACHEPREFIX": str(FOLDER / "pycache"),
    }
    arguments = [sys.executable, "-m", "app"]
    return Command(arguments, PROJECT, environment | scenario.environment)


def call(scenario: Scenario, port: int, number: int, is_over: Event) -> None:
    """One caller, whatever it is answered."""
    chance = random.Random(number)  # noqa: S311
    url = f"http://127.0.0.1:{port}/v1/predict"
    while not is_over.wait(1 / scenario.per_s):
        body = json.dumps({"features": payment(chance, scenario.factor)}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30):
                pass
        except OSError:
            continue


@contextmanager
def prometheus(ports: dict[str, int]) -> Iterator[int]:
    """It scrapes each scenario's service under its namespace; on which port it is."""
    port = free_port()
    targets = [
        {"targets": [f"127.0.0.1:{own}"], "labels": {"namespace": name}}
        for name, own in ports.items()
    ]
    config = {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [str(PROJECT / "deploy/prometheus/rules.yaml")],
        "scrape_configs": [{"job_name": SLUG, "static_configs": targets}],
    }
    (FOLDER / "prometheus.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config.file=prometheus.yaml", "--storage.tsdb.path=data"]
    arguments.append(f"--web.listen-address=127.0.0.1:{port}")
    with (FOLDER / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *arguments], cwd=FOLDER, stderr=log)
    try:
        while status(port, "/-/ready") != 200:
            if process.poll() is not None:
                raise RuntimeError("Prometheus has ended; see build/bench/alerts/prometheus.log")
        yield port
    finally:
        process.terminate()
        process.wait()


def firing(port: int) -> set[tuple[str, str]]:
    """Namespaces and alerts."""
    query = urllib.parse.urlencode({"query": 'ALERTS{alertstate="firing"}'})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}") as answer:
        found = json.load(answer)["data"]["result"]
    return {(one["metric"].get("namespace", ""), one["metric"]["alertname"]) for one in found}


def watch(port: int, todo: list[Scenario], is_over: Event) -> dict[tuple[str, str], float]:
    """When each alert came, in seconds, until all that have to have come, or patience ends."""
    expected = {(scenario.name, alert) for scenario in todo for alert in scenario.alerts}
    came: dict[tuple[str, str], float] = {}
    started = monotonic()
    while expected - came.keys() and monotonic() - started < PATIENCE_S:
        for alert in firing(port) - came.keys():
            came[alert] = monotonic() - started
            print(f"{came[alert]:5.0f} s  {': '.join(alert)}", flush=True)
        is_over.wait(1)
    return came


def run(redis: RedisProcess) -> tuple[list[Scenario], dict[tuple[str, str], float]]:
    todo, is_over = scenarios(redis.url), Event()
    with ExitStack() as stack:
        servers = {}
        for scenario in todo:
            port = free_port()
            log = FOLDER / f"{scenario.name}.log"
            server = Server(command(scenario, port), "/ready", port, log, CPUS)
            servers[scenario.name] = stack.enter_context(server)
        ports = {name: server.port for name, server in servers.items()}
        prometheus_port = stack.enter_context(prometheus(ports))
        callers = stack.enter_context(ThreadPoolExecutor(sum(one.callers for one in todo)))
        stack.callback(is_over.set)
        for scenario in todo:
            for number in range(scenario.callers):
                callers.submit(call, scenario, ports[scenario.name], number, is_over)
            if scenario.act:
                arguments = (servers[scenario.name], redis, is_over)
                Thread(target=scenario.act, args=arguments, daemon=True).start()
        return todo, watch(prometheus_port, todo, is_over)


def as_markdown(todo: list[Scenario], came: dict[tuple[str, str], float], commit_id: str) -> str:
    rows = []
    for scenario in todo:
        for alert in sorted(scenario.alerts) or [""]:
            seconds = came.get((scenario.name, alert))
            after = "never" if seconds is None else f"{seconds:.0f}"
            rows.append([scenario.name, scenario.wrong, alert or "none", after if alert else ""])
    others = sorted(
        f"{alert} ({name}, {seconds:.0f} s)"
        for (name, alert), seconds in came.items()
        if not any(name == one.name and alert in one.alerts for one in todo)
    )
    about = (
        f"Written by `make bench-alerts` on {datetime.now(UTC).date()}, commit {commit_id}. The "
        "services run side by side on two cores, with the rules of `deploy/prometheus/` as they "
        "are; Prometheus scrapes every 5 s. Seconds are from when traffic began, and as nothing "
        "was before, the windows of an hour and more are as long as that: after a good day a "
        "burn takes minutes to be one. Payments are those of a whole day: of the night's alone "
        "the predictions are others than those of the training, which is drift until a day has "
        "passed.\n"
    )
    return "\n".join(
        [
            "# Alerts, brought about on purpose\n",
            about,
            table(["service", "what is wrong", "alert", "after s"], rows),
            f"Others that came with them: {', '.join(others) or 'none'}.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alerts", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("alerts.md"))
    arguments = parser.parse_args()
    if not shutil.which("prometheus"):
        sys.exit("prometheus is not installed: apt-get install prometheus")
    make_project()
    with redis_server(CPUS) as redis:
        todo, came = run(redis)
    arguments.output.write_text(as_markdown(todo, came, commit(REPOSITORY)))
    print(f"\nwrote {os.path.relpath(arguments.output)}")
    allowed = {(one.name, alert) for one in todo for alert in one.alerts | one.also}
    expected = {(one.name, alert) for one in todo for alert in one.alerts}
    sys.exit(bool(expected - came.keys() or came.keys() - allowed))


if __name__ == "__main__":
    main()
