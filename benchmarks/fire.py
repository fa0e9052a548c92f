"""Behaviour under fire: `python -m benchmarks.fire`, which `make bench-fire` runs.

All on this machine, bounded in number and time. It ends only processes that it has started.
"""

import argparse
import asyncio
import json
import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.contestants import Command, Contestant, Place, contestants
from benchmarks.environments import BUILD, MODELS, REPOSITORY, make_place
from benchmarks.load import Exchange, LoadProcess, Plan, Result, measure, percentile_ms
from benchmarks.machine import commit, in_words
from benchmarks.report import number, table
from benchmarks.sections import OURS, exchanges_of, http_bytes
from benchmarks.serving import Server, free_port, running_on, split_cores, status
from benchmarks.workloads import HUGE, POISON, TOLERANCE, Workload, make_models, make_workload

PARTICIPANTS = [OURS, "bare_asgi_batched", "tutorial_fastapi"]
CORES = split_cores()
ANSWER_TIMEOUT_S = 60
OVERLOAD_CONNECTIONS = 12_000
"""As many may wait in an overload, unless the system allows fewer open files."""

PROBE_PAUSE_S = 0.1


@dataclass(frozen=True)
class Target:
    """A contestant with a model, mostly the forest of w2, which raises at POISON and HUGE."""

    name: str
    contestant: Contestant
    place: Place
    workload: Workload
    exchanges: list[Exchange]

    @contextmanager
    def serve(self, **environment: str) -> Iterator[Server]:
        port = free_port()
        command = self.contestant.start(self.place, self.workload.name, port)
        command = Command(command.arguments, command.folder, command.environment | environment)
        log = BUILD / "logs" / f"fire-{self.name}.log"
        with Server(command, self.contestant.ready_path, port, log, CORES.server) as server:
            yield server

    def with_load(self, name: str) -> "Target":
        """The same server with the model of another workload."""
        workload = make_workload(name, MODELS)
        exchanges = exchanges_of(self.contestant, workload)
        return replace(self, workload=workload, exchanges=exchanges)

    def bad(self, **fields: Any) -> bytes:
        """The first good request with other fields; None leaves one out."""
        body = self.workload.bodies[0]
        assert isinstance(body, dict)  # noqa: S101
        body = {key: value for key, value in (body | fields).items() if value is not None}
        return http_bytes(self.contestant.request(self.workload.name, body))


class Client:
    """One connection that is kept; a new one after it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> None:
        if self._streams and self._streams[0].at_eof():
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        self._streams[1].write(request)
        await self._streams[1].drain()

    async def receive(self) -> tuple[int, bytes]:
        """Status and body; status 0 if the connection was lost or nothing came."""
        assert self._streams  # noqa: S101
        reader = self._streams[0]
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                fields = head.lower().split(b"\r\n")
                [length] = [line for line in fields if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(length.split(b":")[1]))
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            self.close()
            return 0, b""
        if b"connection: close" in fields:
            self.close()
        return int(head[9:12]), body

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        try:
            await self.send(request)
        except OSError:
            self.close()
            return 0, b""
        return await self.receive()

    def close(self) -> None:
        if self._streams:
            self._streams[1].transport.abort()
        self._streams = None


async def is_right(client: Client, exchange: Exchange) -> bool:
    status_code, content = await client.ask(exchange.request)
    return status_code == 200 and exchange.fault(content, TOLERANCE) is None


def said(statuses: Counter[int]) -> str:
    names = {0: "connection lost"}
    return ", ".join(f"{names.get(key, key)}: {count}" for key, count in sorted(statuses.items()))


Row = list[str]


# 1. One client that keeps sending bad rows.

BAD: dict[str, dict[str, Any]] = {
    "wrong type": {"f0": "twelve"},
    "NaN": {"f0": float("nan")},
    "short row": {"f7": None},
    "model raises": {"f0": POISON},
    "out of memory": {"f0": HUGE},
}
NEIGHBOURS = 16


def beside_bad_rows(target: Target, scale: float) -> list[Row]:
    rows = []
    with target.serve() as server:
        for kind, fields in BAD.items():
            count = int(600 * scale)
            failed, statuses = asyncio.run(
                _beside(target, server.port, target.bad(**fields), count)
            )
            rows.append([target.contestant.title, kind, f"{failed} of {count}", said(statuses)])
    return rows


async def _beside(target: Target, port: int, bad: bytes, count: int) -> tuple[int, Counter[int]]:
    exchanges = cycle(target.exchanges)
    left, failed = count, 0
    statuses: Counter[int] = Counter()

    async def good() -> None:
        nonlocal left, failed
        client = Client(port)
        while left > 0:
            left -= 1
            if not await is_right(client, next(exchanges)):
                failed += 1
        client.close()

    async def send_bad() -> None:
        client = Client(port)
        while True:
            statuses[(await client.ask(bad))[0]] += 1

    nuisance = asyncio.create_task(send_bad())
    await asyncio.gather(*(good() for _ in range(NEIGHBOURS)))
    nuisance.cancel()
    with suppress(asyncio.CancelledError):
        await nuisance
    return failed, statuses


# 2. One row in a hundred is poison.


def poison_rows(target: Target, scale: float) -> list[Row]:
    count = int(10_000 * scale)
    if target.name == "tutorial_fastapi":
        # At one row a batch it would take minutes, and there is no batch to fail.
        count //= 10
    with target.serve() as server:
        started = perf_counter()
        good, wrong, poison = asyncio.run(_poisoned(target, server.port, count))
        seconds = perf_counter() - started
    return [
        [
            target.contestant.title,
            str(count),
            f"{wrong} of {good}",
            said(poison),
            f"{count / seconds:.0f}",
        ]
    ]


async def _poisoned(target: Target, port: int, count: int) -> tuple[int, int, Counter[int]]:
    numbers = iter(range(count))
    # At random, so that now and then several meet in a batch.
    bad = set(random.Random(1).sample(range(count), count // 100))  # noqa: S311
    poison = target.bad(f0=POISON)
    good = wrong = 0
    statuses: Counter[int] = Counter()

    async def work() -> None:
        nonlocal good, wrong
        client = Client(port)
        for turn in numbers:
            if turn in bad:
                statuses[(await client.ask(poison))[0]] += 1
            else:
                exchange = target.exchanges[turn % len(target.exchanges)]
                good += 1
                if not await is_right(client, exchange):
                    wrong += 1
        client.close()

    await asyncio.gather(*(work() for _ in range(32)))
    return good, wrong, statuses


# 3. Three times as much as it can answer.


def overload(target: Target, scale: float) -> list[Row]:
    # As it comes, requests wait for up to 10 s; with callers in more of a hurry, for 1 s.
    settings: list[dict[str, str]] = [{}]
    if target.name == OURS:
        settings.append({"REQUEST_TIMEOUT_S": "1"})
    return [_overload(target, 20 * scale, environment) for environment in settings]


def _overload(target: Target, seconds: float, environment: dict[str, str]) -> Row:
    with target.serve(**environment) as server:

        def plan(seconds: float, connections: int, rate: float | None = None) -> Plan:
            exchanges = target.exchanges
            return Plan(server.port, exchanges, seconds, connections, rate, cpus=CORES.load)

        measure(plan(1, 32))
        capacity = median(measure(plan(2, 32)).per_s for _ in range(3))
        connections = min(OVERLOAD_CONNECTIONS, open_files() - 200)
        load = LoadProcess(plan(seconds, connections, 3 * capacity))
        probes, result = probed(server, target.contestant, load)
    refused = sum(count for code, count in result.statuses.items() if code in ("429", "503"))
    due = result.sent + result.unsent
    title = target.contestant.title
    if environment:
        title += ", " + " ".join(f"{key}={value}" for key, value in environment.items())
    return [
        title,
        number(capacity),
        f"{result.per_s / capacity:.0%}",
        f"{refused / due:.0%}" + (f", {result.refusals_without_retry_after} without Retry-After"
                                  if result.refusals_without_retry_after else ""),
        number(result.refusals_p99_ms),
        number(result.p50_ms),
        number(result.p99_ms),
        ", ".join(f"{code}: {count}" for code, count in sorted(result.statuses.items())),
        f"{result.lost} / {result.unsent}",
        probes,
    ]  # fmt: skip


def probed(server: Server, contestant: Contestant, load: LoadProcess) -> tuple[str, Result]:
    """What `probe` says while `load` runs, and what comes of that."""
    try:
        return probe(server, contestant, load), load.result()
    except BaseException:
        load.stop()
        raise


def probe(server: Server, contestant: Contestant, load: LoadProcess) -> str:
    """The 99th percentile, in ms, of asking whether the process lives while `load` runs."""
    path = contestant.health_path or contestant.ready_path
    latencies = []
    while not load.wait(PROBE_PAUSE_S):
        started = perf_counter()
        if status(server.port, path) != 200:
            return "**no answer**"
        latencies.append(perf_counter() - started)
    return number(percentile_ms(sorted(latencies), 0.99))


# 4. As much as it can answer.

FULL_LOADS = {"fire": "W2", "w1": "W1", "w3": "W3"}


def full_load(target: Target, scale: float) -> list[Row]:
    return [_full_load(target.with_load(name), title, scale) for name, title in FULL_LOADS.items()]


def _full_load(target: Target, title: str, scale: float) -> Row:
    with target.serve() as server:
        measure(Plan(server.port, target.exchanges, 1, 32, cpus=CORES.load))
        load = LoadProcess(Plan(server.port, target.exchanges, 10 * scale, 32, cpus=CORES.load))
        probes, result = probed(server, target.contestant, load)
    figures = [number(result.per_s), number(result.p99_ms), probes]
    return [f"{target.contestant.title}, {title}", *figures]


# 5. SIGTERM while requests come.

STOPS = 3
TERM_AFTER_S = 2


def stop_under_load(target: Target, scale: float) -> list[Row]:
    workers = [1, 2] if target.name == OURS else [1]
    return [_stop_under_load(target, scale, count) for count in workers]


def _stop_under_load(target: Target, scale: float, workers: int) -> Row:
    environment = {"WEB_CONCURRENCY": str(workers)} if workers > 1 else {}
    answered = lost = sent = left_over = 0
    seconds = []
    faults: Counter[str] = Counter()
    for _ in range(STOPS if scale == 1 else 1):
        with target.serve(**environment) as server:
            plan = Plan(server.port, target.exchanges, 30, NEIGHBOURS, cpus=CORES.load)
            load = LoadProcess(plan)
            try:
                load.wait(TERM_AFTER_S)
                seconds.append(server.stop())
                result = load.result()
            except BaseException:
                load.stop()
                raise
        sent += result.sent
        answered += result.statuses.pop("200", 0)
        lost += result.lost
        left_over += server.left_over
        faults.update(result.statuses)
    others = ", ".join(f"{code}: {count}" for code, count in faults.items())
    return [
        target.contestant.title + (f", {workers} workers" if workers > 1 else ""),
        f"{len(seconds)}",
        f"{sent}",
        f"{answered}",
        f"{lost}" + (f", and {others}" if others else ""),
        ", ".join(f"{value:.1f}" for value in seconds),
        f"{left_over}",
    ]


# 6. Half of two thousand callers hang up.


def cancel_storm(target: Target, scale: float) -> list[Row]:
    count = int(2000 * scale)
    with target.serve() as server:
        right, failed = asyncio.run(_storm(target, server.port, count))
        after = asyncio.run(_still_answers(target, server.port))
    return [
        [
            target.contestant.title,
            f"{count // 2}",
            f"{right} of {count - count // 2}",
            said(failed),
            "yes" if after else "**no**",
        ]
    ]


async def _storm(target: Target, port: int, count: int) -> tuple[int, Counter[int]]:
    right = 0
    failed: Counter[int] = Counter()

    async def stay(exchange: Exchange) -> None:
        nonlocal right
        client = Client(port)
        status_code, content = await client.ask(exchange.request)
        client.close()
        if status_code == 200 and exchange.fault(content, TOLERANCE) is None:
            right += 1
        else:
            failed[status_code] += 1

    async def leave(exchange: Exchange, after_s: float) -> None:
        client = Client(port)
        with suppress(OSError):
            await client.send(exchange.request)
        await asyncio.sleep(after_s)
        client.close()

    callers: list[Coroutine[Any, Any, None]] = []
    for caller in range(count):
        exchange = target.exchanges[caller % len(target.exchanges)]
        # The leavers go one after the other over half a second, while their rows wait or run.
        leaves = caller % 2
        callers.append(leave(exchange, caller % 500 / 1000) if leaves else stay(exchange))
    await asyncio.gather(*callers)
    return right, failed


async def _still_answers(target: Target, port: int) -> bool:
    client = Client(port)
    answers = [await is_right(client, exchange) for exchange in target.exchanges[:8]]
    client.close()
    return all(answers)


@dataclass(frozen=True)
class Trial:
    title: str
    text: str
    head: list[str]
    run: Callable[[Target, float], list[Row]]


TRIALS = {
    "bad": Trial(
        "One client that keeps sending bad rows",
        f"Good requests over {NEIGHBOURS} connections beside it; how many of them failed.",
        ["", "bad row", "neighbours failed", "answers to the bad ones"],
        beside_bad_rows,
    ),
    "poison": Trial(
        "One row in a hundred makes the model raise",
        "Over 32 connections.",
        ["", "requests", "good ones failed", "answers to the poison", "req/s"],
        poison_rows,
    ),
    "overload": Trial(
        "Three times as much as it can answer",
        "Open loop, random arrivals. Goodput is answers with 200 to the capacity, which is what 32 "
        "connections get. Lost requests got no answer; for unsent ones there was no connection. "
        "The probe asks ten times a second whether the process lives.",
        [
            "",
            "capacity/s",
            "goodput",
            "429 or 503",
            "p99 of those ms",
            "p50 of answers ms",
            "p99 of answers ms",
            "statuses",
            "lost / unsent",
            "probe p99 ms",
        ],
        overload,
    ),
    "full": Trial(
        "As much as it can answer",
        "32 connections, each with its next request as soon as it has its answer. The probe asks "
        "ten times a second whether the process lives. The models are those of report.md; a small "
        "one may be run in the event loop.",
        ["", "req/s", "p99 of answers ms", "probe p99 ms"],
        full_load,
    ),
    "stop": Trial(
        "SIGTERM under load",
        f"{NEIGHBOURS} connections, each with its next request as soon as it has its answer, and "
        "with a new connection where the server closes one. Processes that are left when the one "
        "that got the signal has ended would be orphans.",
        ["", "stops", "sent", "answered", "lost", "seconds to exit", "processes left"],
        stop_under_load,
    ),
    "storm": Trial(
        "Half of two thousand callers hang up",
        "All connect at once; every second one leaves within half a second.",
        ["", "left", "stayed and got the right answer", "others got", "answers afterwards"],
        cancel_storm,
    ),
}


def open_files() -> int:
    """How many this process and those it starts may have, raised to what is allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fire", description=__doc__)
    parser.add_argument("--only", choices=list(TRIALS), help="one trial")
    parser.add_argument("--contestants", default=",".join(PARTICIPANTS))
    parser.add_argument("--quick", action="store_true", help="a fifth of everything")
    parser.add_argument(
        "--template", type=Path, default=REPOSITORY, help="another checkout of the template"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    open_files()
    BUILD.mkdir(parents=True, exist_ok=True)
    make_models(MODELS)
    workload = make_workload("fire", MODELS)
    targets = []
    for name in arguments.contestants.split(","):
        print(f"setting up {name}", flush=True)
        contestant = contestants()[name]
        place = make_place(name, arguments.template.absolute())
        targets.append(
            Target(name, contestant, place, workload, exchanges_of(contestant, workload))
        )

    folder = BUILD / "quick" if arguments.quick else BUILD
    folder.mkdir(exist_ok=True)
    store = folder / "fire.json"
    results: dict[str, list[Row]] = json.loads(store.read_text()) if store.is_file() else {}
    with running_on(CORES.load):
        for name in [arguments.only] if arguments.only else TRIALS:
            trial = TRIALS[name]
            print(f"\n{trial.title}", flush=True)
            results[name] = []
            for target in targets:
                rows = trial.run(target, 0.2 if arguments.quick else 1)
                for row in rows:
                    print("  " + " | ".join(row), flush=True)
                results[name] += rows
            store.write_text(json.dumps(results, indent=1) + "\n")
    report = (folder if arguments.quick else Path(__file__).parent) / "fire.md"
    commit_id = commit(arguments.template.absolute())
    report.write_text(as_markdown(results, commit_id, [target.name for target in targets]))
    print(f"\nwrote {os.path.relpath(report)}")


def as_markdown(results: dict[str, list[Row]], commit_id: str, participants: Sequence[str]) -> str:
    day = datetime.now(UTC).date()
    about = (
        f"Written by `python -m benchmarks.fire` on {day}, commit {commit_id}. The model is the "
        "random forest of W2, where nothing else is said; the server has one core. "
        f"{in_words(participants)}.\n"
    )
    parts = ["# Behaviour under fire\n", about]
    for name, trial in TRIALS.items():
        if name in results:
            parts += [f"## {trial.title}\n", trial.text + "\n", table(trial.head, results[name])]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
