"""What is measured: each section gives a list of measurements, which are plain dictionaries."""

import http.client
import itertools
import json
import random
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeVar

from benchmarks.contestants import (
    SERVERS,
    Command,
    Contestant,
    NotSupportedError,
    Place,
    Request,
)
from benchmarks.environments import BUILD, MODELS
from benchmarks.load import Exchange, Plan, Result, measure_by_turns
from benchmarks.redis_server import flush, redis_server
from benchmarks.servers.template.contestant import batch_request, settings
from benchmarks.serving import (
    Cores,
    Server,
    busy_s,
    free_port,
    running_on,
    shared_cores,
    split_cores,
)
from benchmarks.workloads import TOLERANCE, Workload, make_fresh

Measurement = dict[str, Any]
Environment = dict[str, str]
NameT = TypeVar("NameT")

OURS = "template"
BATCHED = "bare_asgi_batched"
WINDOW_MS = 5
"""For which `BATCHED` waits."""

MANY = 32
"""Connections of the closed loop that stands for capacity."""

TURN_S = {"w1": 0.1, "w2": 1.0}
"""For about so long each is asked before the next, where what is to be told apart is near to the
same: many times what a batch takes, as in each turn the last ones wait for nobody."""

OPEN_LOOP_CONNECTIONS = 512
SLICES = 2
"""Into which a round's closed loops are cut, so that those of all contestants alternate."""

CACHE_SLICES = 5
"""The same in the section on the cache, where what is fresh takes much memory to have ready."""

BURST = 20
BURST_S = 0.05
"""So many single requests one after the other, and for so long, find what they need in the CPU's
caches, as those of a caller who is alone do."""

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

SHARES = [0.5, 0.9]
"""Of the capacity, in the open loop."""

TRIALS = 4
"""At three quarters of the capacity, until the machine is as fast afterwards as it was before."""

STEADY = 0.9
"""It is if at least so much of what was answered before is answered afterwards."""

KNOWN = [0.0, 0.5, 1.0]
"""Shares of requests that were sent before, in the section on the cache."""

ROWS = 16
"""Of a request with many, there."""

LEAD_IN_S = 0.5
"""For so long many connections go on before each slice. A trivial model's cache is asked for as
many rows in vain as it may be at once (`VAIN_ROWS` of the service), and while the others were asked
more have been allowed."""

FRESH_PER_S = {"w1": 25_000, "w2": 6_000}
FRESH_BATCHES_PER_S = 6_000
"""More requests than are answered in a second, as none may come twice; with ROWS rows, of w1."""

TIERS: dict[str, Environment] = {
    "off": {"CACHE_ENABLED": "false"},
    "memory": {"CACHE_ENABLED": "true"},
    "redis": {"CACHE_ENABLED": "true", "CACHE_MAX_BYTES": "0"},
}
"""Where answers are kept, in the section on the cache."""

POLICIES: dict[str, Environment] = {
    "learned": {"BATCH_POLICY": "learned"},
    **{
        f"window {wait_ms} ms": {"BATCH_POLICY": "window", "BATCH_MAX_WAIT_MS": str(wait_ms)}
        for wait_ms in (0, 1, 5, 10)
    },
}


@dataclass(frozen=True)
class Bench:
    """Who takes part, in what, for how long."""

    contestants: dict[str, Contestant]
    places: dict[str, Place]
    workloads: dict[str, Workload]
    rounds: int
    seconds: float
    warm_up_s: float
    cores: Cores = field(default_factory=split_cores)

    def serve(self, name: str, workload: str, environment: Environment | None = None) -> "Running":
        """A server of the contestant for the workload, whose answers have been checked.

        Raises:
            NotSupportedError: there can be none.
            WrongAnswerError: it does not answer what the model says.
        """
        contestant = self.contestants[name]
        port = free_port()
        command = contestant.start(self.places[name], workload, port)
        command = Command(
            command.arguments, command.folder, command.environment | (environment or {})
        )
        exchanges = exchanges_of(contestant, self.workloads[workload])
        log = BUILD / "logs" / f"{name}-{workload}.log"
        server = Server(command, contestant.ready_path, port, log, self.cores.server)
        running = Running(self, server, exchanges)
        try:
            running.check(exchanges)
            running.load(MANY, seconds=self.warm_up_s)
        except BaseException:
            server.stop()
            raise
        return running


class WrongAnswerError(Exception):
    pass


@dataclass
class Loaded(Result):
    cpu_us: float | None
    """CPU time of the server for each answer."""

    others: float | None
    """The part of the server's core that others took: where it is large, the rest is noise."""


@dataclass(frozen=True)
class Running:
    bench: Bench
    server: Server
    exchanges: list[Exchange]

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def check(self, exchanges: list[Exchange]) -> None:
        """Ask each request once, and compare every answer with the model's."""
        for exchange in exchanges:
            if fault := exchange.fault(ask(self.server.port, exchange), TOLERANCE):
                raise WrongAnswerError(fault)

    def load(
        self,
        connections: int,
        *,
        rate: float | None = None,
        seconds: float | None = None,
        exchanges: list[Exchange] | None = None,
    ) -> Loaded:
        feed = exchanges or self.exchanges
        [result] = load_by_turns([(self, feed)], connections, rate, seconds or self.bench.seconds)
        return result


def load_by_turns(
    fed: Sequence[tuple[Running, list[Exchange]]],
    connections: int,
    rate: float | None,
    seconds: float,
    turn_s: float = inf,
) -> list[Loaded]:
    """Of each, with what it is asked, for so many `seconds` in turns of about `turn_s`."""
    cores = fed[0][0].bench.cores
    servers = [running.server for running, _ in fed]
    cpu_before_s, busy_before_s = [server.cpu_s() for server in servers], busy_s(cores.server)
    started = perf_counter()
    results = measure_by_turns(
        [
            Plan(
                port=running.server.port,
                exchanges=exchanges,
                seconds=seconds,
                connections=connections,
                rate=rate,
                cpus=cores.load,
                may_spin=cores.are_apart,
                turns=max(1, round(seconds / turn_s)),
            )
            for running, exchanges in fed
        ]
    )
    took_s = perf_counter() - started
    cpu_s = [server.cpu_s() - before for server, before in zip(servers, cpu_before_s, strict=True)]
    others_s = max(0.0, busy_s(cores.server) - busy_before_s - sum(cpu_s))
    return [
        Loaded(
            **asdict(result),
            cpu_us=used_s * 1e6 / answers if (answers := sum(result.statuses.values())) else None,
            others=others_s / took_s if cores.are_apart else None,
        )
        for result, used_s in zip(results, cpu_s, strict=True)
    ]


def exchanges_of(contestant: Contestant, workload: Workload) -> list[Exchange]:
    exchanges = []
    for body, score in zip(workload.bodies, workload.expected, strict=True):
        request = contestant.request(workload.name, body)
        exchanges.append(Exchange(http_bytes(request), [(request.answer_path, score)]))
    return exchanges


def batch_exchanges(workload: Workload, rows: int) -> list[Exchange]:
    """Requests of our service with several rows each."""
    exchanges = []
    for first in range(0, len(workload.bodies), rows):
        bodies = workload.bodies[first : first + rows]
        request, paths = batch_request(bodies)
        scores = workload.expected[first : first + rows]
        exchanges.append(Exchange(http_bytes(request), list(zip(paths, scores, strict=True))))
    return exchanges


def http_bytes(request: Request) -> bytes:
    head = (
        f"POST {request.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n"
        f"Content-Type: {request.content_type}\r\nContent-Length: {len(request.content)}\r\n\r\n"
    )
    return head.encode() + request.content


def ask(port: int, exchange: Exchange) -> bytes:
    """The body of the answer, whatever its status."""
    head, _, content = exchange.request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", first.split()[1], content, headers)
        return connection.getresponse().read()
    finally:
        connection.close()


def rotated(names: list[NameT], turn: int) -> list[NameT]:
    """All of `names`, each turn beginning with another."""
    first = turn % len(names) if names else 0
    return names[first:] + names[:first]


def show(measurement: Measurement, result: Loaded | None = None) -> Measurement:
    """Print a line on it, and give it with the result."""
    where = "  ".join(str(value) for value in measurement.values())
    if result is None:
        print(where, flush=True)
        return measurement
    fault = ""
    if not result.is_clean:
        fault = f"  {result.statuses}, {result.lost} lost, {result.unsent} unsent"
    if result.wrong:
        fault += f", {result.wrong} of {result.checked} WRONG: {result.fault}"
    figures = (
        f"{result.per_s:8.0f}/s  p50 {result.p50_ms}  p99 {result.p99_ms} ms"
        f"  CPU {result.cpu_us or 0:.0f} us  others {result.others or 0:.0%}"
    )
    print(f"{where:60} {figures}{fault}", flush=True)
    return measurement | asdict(result)


def main(bench: Bench) -> list[Measurement]:
    """Every contestant in every workload: closed loop, open loop, memory, cold start."""
    found: list[Measurement] = []
    for workload in bench.workloads:
        for number in range(1, bench.rounds + 1):
            found += _side_by_side(bench, workload, number)
    return found


def _side_by_side(bench: Bench, workload: str, number: int) -> list[Measurement]:
    """A round. All are up at the same time, so that they can be asked in quick succession."""
    about = {"round": number, "workload": workload}
    found: list[Measurement] = []
    running: dict[str, Running] = {}
    with ExitStack() as stack:
        for name in bench.contestants:
            try:
                running[name] = stack.enter_context(bench.serve(name, workload))
            except (NotSupportedError, WrongAnswerError, RuntimeError, TimeoutError) as error:
                why = {"point": "failed", "why": str(error)}
                found.append(show(about | {"contestant": name} | why))
        for turn in range(SLICES):
            for name in rotated(list(running), number + turn):
                point = {"contestant": name, "point": "closed 32", "turn": turn}
                result = running[name].load(MANY, seconds=bench.seconds / SLICES)
                found.append(show(about | point, result))
        for name, latencies_ms in one_by_one(bench, running).items():
            percentiles = quantiles(latencies_ms, n=100)
            figures = {"p50_ms": percentiles[49], "p95_ms": percentiles[94]}
            figures |= {"p99_ms": percentiles[98], "requests": len(latencies_ms)}
            found.append(show(about | {"contestant": name, "point": "closed 1"} | figures))
        for name in rotated(list(running), number):
            found += _open_loop(running[name], found, about | {"contestant": name})
            memory = asdict(running[name].server.memory())
            cold_start = {"cold_start_s": running[name].server.cold_start_s}
            found.append(about | {"contestant": name, "point": "process"} | memory | cold_start)
    return found


def _open_loop(running: Running, found: list[Measurement], about: Measurement) -> list[Measurement]:
    """At shares of what it answered in this round's closed loop."""
    if about["workload"] not in ("w1", "w2"):
        return []
    closed = [
        entry["per_s"]
        for entry in found
        if entry["contestant"] == about["contestant"] and entry["point"] == "closed 32"
    ]
    measured = []
    for share in SHARES:
        rate = share * median(closed)
        result = running.load(OPEN_LOOP_CONNECTIONS, rate=rate)
        point = {"point": f"open {share:.0%}", "rate": round(rate)}
        measured.append(show(about | point, result))
    return measured


def one_by_one(bench: Bench, running: Mapping[str, Running]) -> dict[str, list[float]]:
    """Latencies in ms of single requests, to each contestant in turn.

    Each has a connection of its own. What slows the machine down slows all of them down.
    """
    latencies_ms: dict[str, list[float]] = {name: [] for name in running}
    with ExitStack() as stack, running_on(bench.cores.load):
        connections = {}
        for name, its in running.items():
            connection = socket.create_connection(("127.0.0.1", its.server.port), timeout=60)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections[name] = stack.enter_context(connection)
        ends = perf_counter() + bench.seconds * len(running)
        turns = itertools.count()
        while perf_counter() < ends:
            turn = next(turns)
            for name in rotated(list(running), turn):
                connection, begun = connections[name], perf_counter()
                for number, exchange in enumerate(itertools.cycle(running[name].exchanges)):
                    started = perf_counter()
                    if number >= BURST and started - begun >= BURST_S:
                        break
                    connection.sendall(exchange.request)
                    status = _receive(connection)
                    latencies_ms[name].append(1000 * (perf_counter() - started))
                    if status != b"200":
                        raise WrongAnswerError(f"{name} answered with {status.decode()}")
    return latencies_ms


def _receive(connection: socket.socket) -> bytes:
    """The status of an answer that is read to its end."""
    received = b""
    while True:
        chunk = connection.recv(65_536)
        if not chunk:
            raise WrongAnswerError("the connection was closed before the answer")
        received += chunk
        head, end, content = received.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        if end and length and len(content) >= int(length[1]):
            return head.split()[1]


def growth(bench: Bench) -> list[Measurement]:
    """Our service on W2: with the number of connections, of rows in a request, of workers."""
    found: list[Measurement] = []
    workload = bench.workloads["w2"]
    for number in range(1, bench.rounds + 1):
        with bench.serve(OURS, "w2") as running:
            for rows in (1, 4, 16):
                exchanges = batch_exchanges(workload, rows)
                running.check(exchanges)
                for connections in (1, 8, 32, 128):
                    about = {
                        "round": number,
                        "point": "grid",
                        "connections": connections,
                        "rows": rows,
                    }
                    result = running.load(connections, exchanges=exchanges)
                    found.append(show(about, result))
        found += _workers(bench, number)
    return found


def _workers(bench: Bench, number: int) -> list[Measurement]:
    """One worker and two, on two cores which the load generator shares with them."""
    cores = shared_cores()
    if len(cores.server) < 2:
        return [show({"round": number, "point": "workers", "why": "one core only"})]
    found = []
    sharing = Bench(
        bench.contestants,
        bench.places,
        bench.workloads,
        bench.rounds,
        bench.seconds,
        bench.warm_up_s,
        cores,
    )
    for workers in (1, 2):
        with sharing.serve(OURS, "w2", {"WEB_CONCURRENCY": str(workers)}) as running:
            about = {"round": number, "point": "workers", "workers": workers}
            # Twice as many as fill a batch, so that each of two workers can fill its own.
            found.append(show(about, running.load(2 * MANY)))
    return found


def policies(bench: Bench) -> list[Measurement]:
    """Our learned wait against fixed windows, at every load."""
    found: list[Measurement] = []
    for workload in [name for name in ("w1", "w2") if name in bench.workloads]:
        for number in range(1, bench.rounds + 1):
            found += _policies_side_by_side(bench, workload, number)
        found += _longest_waits(bench, workload)
    return found


def _policies_side_by_side(bench: Bench, workload: str, number: int) -> list[Measurement]:
    found: list[Measurement] = []
    about: Measurement = {"round": number, "workload": workload}
    with ExitStack() as stack:
        up = {
            policy: stack.enter_context(bench.serve(OURS, workload, environment))
            for policy, environment in POLICIES.items()
        }
        for connections in (1, 2, 8, 32):
            found += _by_turns(bench, up, about | {"point": f"closed {connections}"}, connections)
        capacity = found[-len(up)]["per_s"]
        for share in SHARES:
            these = about | {"point": f"open {share:.0%}", "rate": round(share * capacity)}
            found += _by_turns(bench, up, these, OPEN_LOOP_CONNECTIONS, share * capacity)
    return found


def _by_turns(
    bench: Bench,
    up: Mapping[str, Running],
    about: Measurement,
    connections: int,
    rate: float | None = None,
) -> list[Measurement]:
    fed = [(running, running.exchanges) for running in up.values()]
    turn_s = TURN_S[about["workload"]]
    results = load_by_turns(fed, connections, rate, bench.seconds, turn_s)
    return [
        show(about | {"policy": policy}, result) for policy, result in zip(up, results, strict=True)
    ]


def _longest_waits(bench: Bench, workload: str) -> list[Measurement]:
    """What no longest wait may spoil: the capacity, and that three quarters of it are answered.

    The capacity is in comparison to the usual settings, by turns. The three quarters are of the
    service's own: one start of a service may be a fifth slower than another for as long as it
    lives. How much the machine takes shows the bare app with a minimal batcher.
    """
    found = []
    with ExitStack() as stack:
        usual = stack.enter_context(bench.serve(OURS, workload))
        bare = None
        if BATCHED in bench.contestants:
            bare = stack.enter_context(bench.serve(BATCHED, workload))
        for number in range(1, bench.rounds + 1):
            about: Measurement = {"round": number, "workload": workload, "point": "75%"}
            for policy in ("learned", "window"):
                for wait_ms in (0, 1, 5, 20):
                    environment = {"BATCH_POLICY": policy, "BATCH_MAX_WAIT_MS": str(wait_ms)}
                    with bench.serve(OURS, workload, environment) as running:
                        these = about | {"wait_policy": policy, "wait_ms": wait_ms}
                        of_usual = usual.load(MANY).per_s
                        found.append(_at_three_quarters(these, running, of_usual))
            if bare:
                these = about | {"wait_policy": BATCHED, "wait_ms": WINDOW_MS}
                found.append(_at_three_quarters(these, bare, usual.load(MANY).per_s))
    return found


def _at_three_quarters(about: Measurement, running: "Running", of_usual: float) -> Measurement:
    """Of what `running` can do with 32 connections, in the open loop.

    If it can do less afterwards, the machine became slower meanwhile, and it was more than three
    quarters of what anybody could do: then it is tried again.
    """
    ratio = None
    for trial in range(1, TRIALS + 1):
        capacity = running.load(MANY).per_s
        # Later ones are not just after it.
        ratio = ratio or capacity / of_usual
        result = running.load(OPEN_LOOP_CONNECTIONS, rate=0.75 * capacity)
        is_steady = running.load(MANY).per_s >= STEADY * capacity
        due = (result.sent + result.unsent) / running.bench.seconds
        these = {"trial": trial, "is_steady": is_steady, "of_usual": ratio}
        found = show(about | these | {"due_per_s": due, "share": result.per_s / due}, result)
        if is_steady:
            break
    return found


def gpu(bench: Bench) -> list[Measurement]:
    """W3 on a GPU beside the CPU: by the rows that a batch may have; with sizes that are fixed
    and run beforehand; and with the next batch prepared while one is computed."""
    place = bench.places[OURS]
    if not _has_cuda(place.python):
        why = "skipped: the template's environment has no onnxruntime with CUDA"
        return [show({"point": "gpu", "why": why})]
    variants = [("w3", rows) for rows in (1, 8, 32, 128)] + [("w3_fixed", 32), ("w3_pipelined", 32)]
    found: list[Measurement] = []
    for workload in [name for name in ("w3", "w3b") if name in bench.workloads]:
        for number in range(1, bench.rounds + 1):
            for device in ("cpu", "cuda"):
                for predictor, rows in variants:
                    about: Measurement = {"round": number, "point": "gpu", "workload": workload}
                    about |= {"device": device, "predictor": predictor, "rows": rows}
                    environment = settings(place, predictor)
                    environment |= {"DEVICE": device, "BATCH_MAX_ROWS": str(rows)}
                    try:
                        running = bench.serve(OURS, workload, environment)
                    except (NotSupportedError, WrongAnswerError, RuntimeError) as error:
                        found.append(show(about | {"why": str(error)}))
                        continue
                    with running:
                        for connections in (1, 32, 128):
                            result = running.load(connections)
                            found.append(show(about | {"connections": connections}, result))
    return found


def cache(bench: Bench) -> list[Measurement]:
    """Our response cache: without, in memory, and in Redis alone, by how many rows are known."""
    found: list[Measurement] = []
    with redis_server(bench.cores.load) as redis:
        for workload in [name for name in ("w1", "w2") if name in bench.workloads]:
            known = exchanges_of(bench.contestants[OURS], bench.workloads[workload])
            seconds = _cache_seconds(bench)
            count = int(FRESH_PER_S[workload] * seconds)
            fresh = exchanges_of(bench.contestants[OURS], make_fresh(workload, MODELS, count))
            feeds = {f"known {share:.0%}": mixed(known, fresh, share) for share in KNOWN}
            if workload == "w1":
                rows = make_fresh("w1", MODELS, int(FRESH_BATCHES_PER_S * seconds) * ROWS)
                feeds[f"known 0%, {ROWS} rows"] = batch_exchanges(rows, ROWS)
            for number in range(1, bench.rounds + 1):
                about = {"round": number, "workload": workload}
                found += _caches_side_by_side(bench, about, redis.url, feeds)
                flush(redis.url)
    return found


def _caches_side_by_side(
    bench: Bench, about: Measurement, redis_url: str, mixtures: Mapping[str, list[Exchange]]
) -> list[Measurement]:
    """A round. A service for each tier and each of the mixtures, all up at the same time."""
    found: list[Measurement] = []
    running: dict[tuple[str, str], Running] = {}
    feeds: dict[tuple[str, str], Iterator[Exchange]] = {}

    def load(point: str, connections: int, seconds: float) -> list[Loaded]:
        most = int(len(mixtures[point]) * seconds / _cache_seconds(bench))
        fed = [
            (running[tier, point], list(itertools.islice(feeds[tier, point], most)))
            for tier in TIERS
        ]
        return load_by_turns(fed, connections, None, seconds, TURN_S[about["workload"]])

    with ExitStack() as stack:
        for (database_number, point), tier in itertools.product(enumerate(mixtures), TIERS):
            key = tier, point
            # Each in a database of its own, as what is fresh to one is fresh to the others, too.
            database = f"{redis_url.rstrip('/')}/{database_number}"
            environment = TIERS[tier] | ({"REDIS_URL": database} if tier == "redis" else {})
            # It is warmed up with those that are to be known.
            running[key] = stack.enter_context(bench.serve(OURS, about["workload"], environment))
            feeds[key] = iter(mixtures[point])
        for turn, connections in itertools.product(range(CACHE_SLICES), (1, MANY)):
            for point in rotated(list(mixtures), about["round"] - 1 + turn):
                if connections == MANY:
                    load(point, MANY, LEAD_IN_S)
                results = load(point, connections, bench.seconds / CACHE_SLICES)
                of = {"turn": turn, "point": point, "connections": connections}
                for tier, result in zip(TIERS, results, strict=True):
                    found.append(show(about | {"tier": tier} | of, result))
    return found


def _cache_seconds(bench: Bench) -> float:
    """For how long each mixture is sent in a round."""
    return 2 * bench.seconds + CACHE_SLICES * LEAD_IN_S


def mixed(known: list[Exchange], fresh: list[Exchange], share: float) -> list[Exchange]:
    """As many as `fresh`, of which `share` are of `known`, in random order."""
    chance = random.Random(len(fresh))  # noqa: S311
    return [chance.choice(known) if chance.random() < share else new for new in fresh]


def parts(bench: Bench) -> list[Measurement]:
    """What parts of a request's way take in a loop, in our service with W1."""
    place = bench.places[OURS]
    command = bench.contestants[OURS].start(place, "w1", free_port())
    script = str(SERVERS / "template" / "parts.py")
    found = []
    for number in range(1, bench.rounds + 1):
        done = subprocess.run(
            ["taskset", "--cpu-list", ",".join(map(str, bench.cores.server)), place.python, script],
            cwd=command.folder,
            env=command.environment | {"PYTHONPATH": ".", "LOG_LEVEL": "error"},
            capture_output=True,
            text=True,
            check=True,
        )
        us = json.loads(done.stdout.splitlines()[-1])
        found += [{"round": number, "part": part, "us": value} for part, value in us.items()]
    return found


def _has_cuda(python: Path) -> bool:
    code = "import onnxruntime; print(*onnxruntime.get_available_providers())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return "CUDAExecutionProvider" in done.stdout


SECTIONS: dict[str, Callable[[Bench], list[Measurement]]] = {
    "main": main,
    "growth": growth,
    "policies": policies,
    "cache": cache,
    "parts": parts,
    "gpu": gpu,
}
