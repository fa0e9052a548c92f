"""Load test of a service: `python -m loadtest`, see README.md.

Starts the service, or takes the one at --url, sends more and more requests for predictions, and
says what it can take and how to set it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from app.discovery import PredictorClass, discover
from app.errors import PredictionFailed, StartupError
from app.settings import Settings, load_settings
from loadtest import batches, report
from loadtest.advice import Findings, Objective
from loadtest.batches import Batch
from loadtest.driver import Driver
from loadtest.measure import Step, read_counters
from loadtest.reasons import advise
from loadtest.service import LoadTestError, Service, started
from loadtest.variations import body, variations

CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
"""Of the closed loop."""

SHARES = tuple(tenth / 10 for tenth in range(1, 13))
"""The rates of the open loop, of what the closed one got."""

HERE = (
    f"Measured on this machine: one worker, {os.cpu_count()} CPUs, of which this load test took "
    "its part. For the numbers of a pod, run it beside one, with --url."
)

TRIED = 20
"""Variations that are sent once before the others are."""


@dataclass(frozen=True)
class Subject:
    """The model that is asked, and how."""

    name: str
    predictor: PredictorClass
    service: Service


def main() -> None:
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As with Ctrl-C: what was started is stopped.
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        settings = load_settings()
        name, predictor = _choose(settings, arguments.model)
        objective = Objective(arguments.p99_ms, arguments.rate)
        with _service(settings, arguments.url) as service:
            is_ours = service.process is not None
            timed = _time_batches(name, predictor, settings, objective, may_lack=not is_ours)
            subject = Subject(name, predictor, service)
            requests = [service.request(name, content) for content in _bodies(subject)]
            patience_s = 1 + 2 * objective.p99_ms / 1000
            with Driver(service, name, requests, arguments.seconds, patience_s) as driver:
                found = _drive(driver, subject, objective, timed)
        report.show(f"\n{report.advice(advise(found))}")
        if is_ours:
            report.show(f"\n{report.paragraph(HERE)}")
    except (StartupError, LoadTestError, PredictionFailed) as error:
        sys.exit(f"loadtest: {error}")
    except KeyboardInterrupt:
        sys.exit("\nloadtest: stopped")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description="Load test of the service: what it can take, and how to set it.",
        epilog="LOAD_API_KEY in the environment is sent as X-API-Key.",
    )
    parser.add_argument("--url", type=_url, help="of a service that runs; else one is started")
    parser.add_argument("--model", help="which one to ask; else the default model")
    parser.add_argument(
        "--seconds", type=_number_between(0.05, 600), default=2, help="of each step (default: 2)"
    )
    parser.add_argument(
        "--rate",
        type=_number_between(0, 1e9),
        help="requests a second that are expected at the peak",
    )
    parser.add_argument(
        "--p99-ms",
        type=_number_between(0, 60_000),
        default=500,
        help="the objective: 99 of 100 requests are answered within it (default: 500)",
    )
    return parser.parse_args()


def _number_between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or value == 0:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number


def _url(text: str) -> str:
    parts = urlsplit(text)
    is_plain = not (parts.username or parts.query or parts.fragment)
    # A port that is none raises.
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.port == 0
        or not is_plain
    ):
        raise argparse.ArgumentTypeError(f"{text} is not like http://localhost:8080")
    return text.rstrip("/")


def _choose(settings: Settings, name: str | None) -> tuple[str, PredictorClass]:
    predictors = discover(settings.predictors_dir)
    name = name or settings.default_model or next(iter(predictors))
    if name not in predictors:
        raise LoadTestError(f"there is no model {name}; choose of: {', '.join(predictors)}")
    return name, predictors[name]


def _time_batches(
    name: str,
    predictor_class: PredictorClass,
    settings: Settings,
    objective: Objective,
    *,
    may_lack: bool,
) -> list[Batch]:
    try:
        predictor = batches.load(name, predictor_class, settings)
    except StartupError as error:
        if not may_lack:
            raise
        report.show(report.paragraph(f"Batches are not timed here: {error}"))
        return []
    rows = list(variations(predictor_class.example).values())
    timed = batches.measure(predictor, rows, objective.p99_ms / 2)
    report.show(f"Batches of {name}, timed on the predictor alone:\n\n{report.batch_table(timed)}")
    return timed


@contextmanager
def _service(settings: Settings, url: str | None) -> Iterator[Service]:
    if url:
        key = os.environ.get("LOAD_API_KEY", "")
        if not key.isascii() or (key and not key.isprintable()):
            raise LoadTestError("LOAD_API_KEY has characters that a header cannot have")
        service = Service(url, key)
        service.wait_until_ready()
        yield service
        return
    with started(settings) as service:
        report.show(f"Starting the service at {service.url}, with one worker.\n")
        service.wait_until_ready()
        yield service


def _drive(driver: Driver, subject: Subject, objective: Objective, timed: list[Batch]) -> Findings:
    """Measure, and print what comes of it at once."""
    driver.warm_up()
    report.show(
        report.heading(
            "Closed loop: each connection sends its next request when it has its answer.",
            "connections",
        )
    )
    closed = [_shown(driver.closed_loop(connections)) for connections in CONNECTIONS]
    best = max(step.per_s for step in closed)
    if not best:
        raise LoadTestError("no request was answered in time; see --seconds")
    report.show(
        report.heading(
            "Open loop: requests come whether or not others are answered, and a latency begins "
            "when its request was due.",
            "requests/s",
        )
    )
    steps = [_shown(driver.open_loop(best * share)) for share in SHARES]
    if drawn := report.picture(steps):
        report.show(f"\n{drawn}")
    for note in report.notes([*closed, *steps]):
        report.show(f"\n{report.paragraph(note)}")
    counters = read_counters(subject.service, subject.name)
    max_rows = int(counters.get("inference_batch_max_rows", 0)) if counters else 0
    return Findings(subject.predictor, objective, timed, steps, max_rows or None)


def _shown(step: Step) -> Step:
    report.show(report.row(step))
    return step


def _bodies(subject: Subject) -> list[bytes]:
    """Of the requests to send.

    Raises:
        LoadTestError: not even the example is answered with 200.
    """
    service, example = subject.service, body(subject.predictor.example)
    status = service.status(subject.name, example)
    if status != 200:
        remedy = {401: "; set LOAD_API_KEY", 404: f"; it has no model {subject.name}"}
        raise LoadTestError(f"the example is answered with {status}{remedy.get(status, '')}")
    bodies = list(variations(subject.predictor.example))
    # The predictor may know of rows that are valid and yet not to be scored.
    if any(service.status(subject.name, varied) != 200 for varied in bodies[:TRIED]):
        bodies = [example]
    are = "1 row, the example" if len(bodies) == 1 else f"{len(bodies):,} variations of the example"
    report.show(
        "\n"
        + report.paragraph(
            f"Requests for one prediction each, of {are}. All of them ask the model "
            "(Cache-Control: no-cache); what the cache answers costs less."
        )
    )
    return bodies


if __name__ == "__main__":
    main()
