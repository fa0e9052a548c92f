"""What it costs to be watched, and whether what is seen is right: `make bench-observability`.

W1 with nothing on and with more and more, side by side; scrapes of two busy workers; and tens of
thousands of lines of the log, each of which has to be JSON. All on this machine, bounded in time
and number.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from threading import Event, Thread
from time import perf_counter

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.contestants import Command, Place, contestants
from benchmarks.environments import BUILD, MODELS, REPOSITORY, make_place
from benchmarks.fire import Client, said
from benchmarks.load import Exchange, LoadProcess, Plan, Result, measure
from benchmarks.machine import commit
from benchmarks.report import table
from benchmarks.sections import MANY, OURS, exchanges_of
from benchmarks.servers.template.contestant import SLUG
from benchmarks.serving import Server, free_port, shared_cores, split_cores
from benchmarks.workloads import make_fresh, make_models, make_workload

STARTS = 6
"""Of each variant: what one start has of the machine's memory it has for good, which can make as
much of a difference as what is measured."""

ROUNDS = 4
"""With each start."""

SECONDS = 0.7
SCRAPES = 100
SCRAPE_EVERY_S = 0.1
LINES = 50_000
CALLERS = 32
SAMPLE_ROWS = 1000
MOST_COST = 0.12
MOST_SCRAPE_MS = 50
FOLDER = BUILD / "observability"

WITHOUT_METRICS = """
from prometheus_client import Counter, Gauge, Histogram

def nothing(*_, **__):
    pass

Counter.inc = Gauge.set = Gauge.inc = Gauge.dec = Histogram.observe = nothing
"""
"""As sitecustomize.py, which Python imports first: a service cannot be told to count nothing."""

NOTHING = "nothing"
ALL = "all, with one trace in 1,000"
EVERY_TRACE = "all, with every trace"
QUIET = {"LOG_LEVEL": "error", "DRIFT_ROWS_PER_S": "0"}
LOG = {"LOG_LEVEL": "info", "LOG_FORMAT": "json"}

FAULTY = """
from pathlib import Path

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    x: float


class Prediction(BasePrediction):
    y: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(x=1)

    def load(self, artifact_dir: Path, device: Device) -> None:
        pass

    def predict(self, batch: list[Features]) -> list[Prediction]:
        if any(row.x < 0 for row in batch):
            raise ValueError("less than nothing")
        return [Prediction(y=row.x) for row in batch]
"""
PUBLISH = """
from pathlib import Path
from app.artifacts import new_version

with new_version(Path("artifacts"), "faulty", input_schema={}) as folder:
    (folder / "none.txt").write_text("")
"""


@contextmanager
def receiver(taken: "SimpleQueue[bytes]") -> Iterator[str]:
    """Takes traces; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def variants(traces_url: str) -> dict[str, dict[str, str]]:
    """What is on, by what the environment says."""
    silent = {"PYTHONPATH": str(FOLDER / "silent")}
    drift = {"DRIFT_ROWS_PER_S": "100"}
    traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": traces_url}
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
    some = QUIET | LOG | drift | traces | sampler
    return {
        NOTHING: QUIET | silent,
        "metrics": QUIET,
        "metrics, log": QUIET | LOG,
        "metrics, log, drift": QUIET | LOG | drift,
        ALL: some | {"OTEL_TRACES_SAMPLER_ARG": "0.001"},
        "all, with one trace in 100": some | {"OTEL_TRACES_SAMPLER_ARG": "0.01"},
        EVERY_TRACE: QUIET | LOG | drift | traces,
    }


def start(place: Place, port: int, environment: dict[str, str], cpus: list[int]) -> Server:
    own = contestants()[OURS].start(place, "w1", port)
    settings = own.environment | {"ARTIFACTS_DIR": str(FOLDER / "artifacts")} | environment
    log = FOLDER / f"{port}.log"
    return Server(Command(own.arguments, own.folder, settings), "/ready", port, log, cpus)


def publish_with_sample(place: Place) -> None:
    """W1, with a reference of all of its fields."""
    rows = make_fresh("w1", MODELS, SAMPLE_ROWS).bodies
    (FOLDER / "sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = contestants()[OURS].start(place, "w1", 1)
    model = str(place.models / "w1" / "model.onnx")
    publish = ["-m", "app.publish", "w1", model, "--sample", str(FOLDER / "sample.jsonl")]
    subprocess.run(
        [str(place.python), *publish],
        cwd=own.folder,
        env=own.environment
        | {"ARTIFACTS_DIR": str(FOLDER / "artifacts"), "PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
    )


@dataclass
class Cost:
    """Of one variant: answers a second and CPU time of each, by round."""

    per_s: list[float]
    cpu_us: list[float]
    answers: int = 0

    def ratio(self, base: "Cost") -> float:
        """Of the answers a second to those of `base` in the same round; the median."""
        return median(a / b for a, b in zip(self.per_s, base.per_s, strict=True))


def load(server: Server, exchanges: list[Exchange], seconds: float) -> tuple[Result, float]:
    """What came of it, and the server's CPU time for each answer in us."""
    cores = split_cores()
    before_s = server.cpu_s()
    plan = Plan(
        port=server.port,
        exchanges=exchanges,
        seconds=seconds,
        connections=MANY,
        cpus=cores.load,
        may_spin=cores.are_apart,
    )
    result = measure(plan)
    if not result.is_clean:
        raise RuntimeError(f"not every answer was right: {result.fault}")
    return result, (server.cpu_s() - before_s) * 1e6 / sum(result.statuses.values())


def costs(
    place: Place, exchanges: list[Exchange], starts: int, taken: "SimpleQueue[bytes]"
) -> dict[str, Cost]:
    """Of each variant, in turns on one core; each is scraped once in its turn."""
    silent = FOLDER / "silent"
    silent.mkdir(parents=True)
    (silent / "sitecustomize.py").write_text(WITHOUT_METRICS)
    with receiver(taken) as url:
        chosen = variants(url)
        found = {name: Cost([], []) for name in chosen}
        for _ in range(starts):
            with ExitStack() as stack:
                servers = {}
                for name, environment in chosen.items():
                    server = start(place, free_port(), environment, split_cores().server)
                    servers[name] = stack.enter_context(server)
                    load(server, exchanges, SECONDS)
                for number in range(ROUNDS):
                    cost_of_round(servers, number, exchanges, found)
    return found


def cost_of_round(
    servers: dict[str, Server], number: int, exchanges: list[Exchange], found: dict[str, Cost]
) -> None:
    names = list(servers)
    first = number % len(names)
    for name in names[first:] + names[:first]:
        scrape(servers[name].port)
        result, cpu_us = load(servers[name], exchanges, SECONDS)
        found[name].per_s.append(result.per_s)
        found[name].cpu_us.append(cpu_us)
        found[name].answers += sum(result.statuses.values())
    print("; ".join(f"{name}: {found[name].per_s[-1]:,.0f}/s" for name in names), flush=True)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


def scrape(port: int) -> tuple[float, bytes]:
    """The seconds that one takes, on a connection of its own, and what it gives."""

    async def ask() -> bytes:
        client = Client(port)
        status, body = await client.ask(get("/metrics"))
        client.close()
        if status != 200:
            raise RuntimeError(f"/metrics: {status}")
        return body

    started = perf_counter()
    body = asyncio.run(ask())
    return perf_counter() - started, body


@dataclass
class Scrapes:
    seconds: list[float]
    text: bytes
    """Of the last one."""

    per_s: float
    """Answers of the service meanwhile."""


def scrapes(place: Place, exchanges: list[Exchange]) -> Scrapes:
    """Of a service of two workers, with all that they can do."""
    cpus = shared_cores().server
    seconds: list[float] = []
    text = b""
    environment = QUIET | LOG | {"DRIFT_ROWS_PER_S": "100", "WEB_CONCURRENCY": "2"}
    with start(place, free_port(), environment, cpus) as server:
        planned_s = SCRAPES * SCRAPE_EVERY_S * 2 + 5
        busy = LoadProcess(Plan(server.port, exchanges, planned_s, MANY, cpus=cpus))
        pause = Event()
        pause.wait(2)
        for _ in range(SCRAPES):
            took_s, text = scrape(server.port)
            seconds.append(took_s)
            pause.wait(SCRAPE_EVERY_S)
        result = busy.result()
    return Scrapes(seconds, text, result.per_s)


@dataclass
class Lines:
    count: int = 0
    broken: int = 0
    events: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    counted: float = 0
    """By /metrics: predictions, whatever their status."""

    predictions: int = 0

    @property
    def is_right(self) -> bool:
        """Whether each request has its line, and each prediction is counted."""
        has_all = self.events["request"] == self.statuses.total()
        return not self.broken and has_all and self.counted == self.predictions


def faulty_service(place: Place, port: int) -> "subprocess.Popen[bytes]":
    """Two workers, whose log is a pipe."""
    folder = FOLDER / "faulty"
    (folder / "predictors").mkdir(parents=True)
    (folder / "predictors" / "faulty.py").write_text(FAULTY)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(place.home / SLUG),
        "PREDICTORS_DIR": str(folder / "predictors"),
        "ARTIFACTS_DIR": str(folder / "artifacts"),
        "DEFAULT_MODEL": "faulty",
        "BIND_ADDRESS": "127.0.0.1",
        "PORT": f"{port}",
        "WEB_CONCURRENCY": "2",
        "CACHE_ENABLED": "false",
    }
    publish = [str(place.python), "-c", PUBLISH]
    subprocess.run(publish, cwd=folder, env=environment, check=True, capture_output=True)
    return subprocess.Popen(
        [str(place.python), "-m", "app"],
        cwd=place.home / SLUG,
        env=environment,
        stderr=subprocess.PIPE,
    )


def requests() -> Iterator[tuple[bytes, bool]]:
    """Good and bad ones, and whether each is a prediction."""
    chance = random.Random(1)  # noqa: S311
    bodies = [
        ("/v1/predict", {"features": {"x": 1}}, 80),
        ("/v1/predict", {"features": {"x": "much"}}, 8),
        ("/v1/predict", {"features": {"x": -1}}, 4),
        ("/v1/predict/batch", {"instances": [{"x": 1}] * 5}, 6),
        ("/nowhere", {}, 2),
    ]
    while True:
        path, body, _ = chance.choices(bodies, [weight for *_, weight in bodies])[0]
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        head += f"X-Request-ID: {chance.getrandbits(400):0100x}\r\n"
        yield f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content, path != "/nowhere"


async def ask_for_lines(port: int, found: Lines, at_least: int) -> None:
    source, statuses, client = requests(), found.statuses, Client(port)
    while (await client.ask(get("/ready")))[0] != 200:
        await asyncio.sleep(0.1)

    async def call() -> None:
        client = Client(port)
        while statuses.total() < at_least:
            request, is_prediction = next(source)
            status, _ = await client.ask(request)
            statuses[status] += 1
            found.predictions += is_prediction
        client.close()

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    _, text = await client.ask(get("/metrics"))
    client.close()
    for line in text.decode().splitlines():
        if line.startswith("http_requests_total") and 'handler="/v1/predict' in line:
            found.counted += float(line.rpartition(" ")[2])


def lines(place: Place, at_least: int) -> Lines:
    """From the first of a start to the last of a stop, with faults of all kinds in between."""
    port, found = free_port(), Lines()
    process = faulty_service(place, port)

    def read() -> None:
        assert process.stderr  # noqa: S101
        for line in process.stderr:
            found.count += 1
            try:
                found.events[json.loads(line)["event"]] += 1
            except ValueError:
                found.broken += 1

    reading = Thread(target=read)
    reading.start()
    try:
        asyncio.run(ask_for_lines(port, found, at_least))
    finally:
        process.terminate()
        process.wait()
        reading.join()
    return found


def traces_in(taken: "SimpleQueue[bytes]") -> int:
    """Spans of predictions that came."""
    count = 0
    while not taken.empty():
        request = ExportTraceServiceRequest.FromString(taken.get())
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                count += sum(span.name == "POST /v1/predict" for span in scope.spans)
    return count


def as_markdown(found: dict[str, Cost], traces: int, scraped: Scrapes, written: Lines) -> str:
    base = found[NOTHING]
    rows = []
    for name, cost in found.items():
        cpu = [ours / theirs for ours, theirs in zip(cost.cpu_us, base.cpu_us, strict=True)]
        rates = [f"{median(cost.per_s):,.0f}", f"{cost.ratio(base):.2f}"]
        rows.append([name, *rates, f"{median(cost.cpu_us):.0f}", f"{median(cpu):.2f}"])
    about = (
        f"Written by `make bench-observability` on {datetime.now(UTC).date()}, commit "
        f"{commit(REPOSITORY)}."
        "\n"
    )
    cost_text = (
        f"W1, {MANY} connections, no cache, {len(base.per_s) // ROUNDS} starts of each and "
        f"{ROUNDS} rounds of {SECONDS:g} s in turns with each start, the server on one core and "
        "the load on another; medians, ratios of the same round. "
        "Drift is of eight features and the prediction, the log is a file, each variant is "
        f"scraped in its turn. The target: at most {MOST_COST:.0%} of the throughput for all.\n"
    )
    traced = found[EVERY_TRACE].answers
    traces_text = (
        f"Of {traced:,} requests all of which are traced, and of some others, {traces:,} traces "
        "arrived; what is more than the SDK can send, it drops.\n"
    )
    took = sorted(scraped.seconds)
    series = sum(line[:1] != b"#" for line in scraped.text.splitlines())
    scrape_text = (
        f"{len(took)} scrapes of two workers under {scraped.per_s:,.0f} answers a second, load and "
        f"workers on the same two cores: {series} series, {len(scraped.text) / 1000:.0f} kB. "
        f"Median {median(took) * 1000:.1f} ms, 95% {took[int(len(took) * 0.95)] * 1000:.1f} ms, "
        f"longest {took[-1] * 1000:.1f} ms. The target: {MOST_SCRAPE_MS} ms.\n"
    )
    events = ", ".join(f"{count:,} {event}" for event, count in written.events.most_common(3))
    lines_text = (
        f"{written.count:,} lines of two workers through a pipe, start and stop included "
        f"({events}, and others): {written.broken} that are no JSON. Statuses: "
        f"{said(written.statuses)}. Predictions sent: {written.predictions:,}; counted by "
        f"/metrics: {written.counted:,.0f}.\n"
    )
    head = ["on", "req/s", "ratio", "CPU us a request", "ratio"]
    return "\n".join(
        [
            "# The cost of being watched\n",
            about,
            cost_text,
            table(head, rows),
            traces_text,
            "## Scrapes\n",
            scrape_text,
            "## The log\n",
            lines_text,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observability", description=__doc__)
    parser.add_argument("--starts", type=int, default=STARTS)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("observability.md"))
    arguments = parser.parse_args()
    make_models(MODELS)
    place = make_place(OURS, REPOSITORY)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    exchanges = exchanges_of(contestants()[OURS], make_workload("w1", MODELS))
    publish_with_sample(place)
    taken: SimpleQueue[bytes] = SimpleQueue()
    found = costs(place, exchanges, arguments.starts, taken)
    traces = traces_in(taken)
    scraped = scrapes(place, exchanges)
    written = lines(place, arguments.lines)
    arguments.output.write_text(as_markdown(found, traces, scraped, written))
    print(f"\nwrote {os.path.relpath(arguments.output)}")
    is_cheap = found[ALL].ratio(found[NOTHING]) >= 1 - MOST_COST
    is_quick = median(scraped.seconds) * 1000 < MOST_SCRAPE_MS
    sys.exit(not (is_cheap and is_quick and written.is_right))


if __name__ == "__main__":
    main()
