"""Answers from a Redis that several services share: `make bench-shared-cache`.

Three models in two versions each, served by four processes with one Redis, which is stopped,
killed, emptied, lied in, filled up and shut meanwhile, or what it says is lost, late or garbled.
Each model and version multiplies by a number of its own, so an answer that belongs to another one,
or to another row, is seen. All on this machine, bounded in number; it ends only processes that it
has started.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import redis.asyncio as redis

from benchmarks import hung_redis
from benchmarks.contestants import Command, Place
from benchmarks.environments import BUILD, REPOSITORY, make_place
from benchmarks.fire import Client
from benchmarks.machine import commit
from benchmarks.redis_server import RedisProcess, redis_server
from benchmarks.report import table
from benchmarks.sections import OURS
from benchmarks.servers.template.contestant import SLUG
from benchmarks.serving import Server, free_port, running_on, shared_cores, split_cores

REQUESTS = 100_000
CALLERS = 32
MODELS = ("alpha", "beta", "gamma")
VERSIONS = ("1", "2")
REPLICAS = 2
"""Services of each version."""

ROWS = 400
"""Different rows; few enough to come again, many enough for misses until the end."""

RECOVERY_S = 5
"""The time that the issue gives a service to use a Redis again that is well."""

PASSWORD = "known to nobody"  # noqa: S105
SEED = 20_261_122
CORES = shared_cores()

PREDICTOR = """
from pathlib import Path

from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device


class Features(BaseFeatures):
    x: float
    note: str = ""


class Prediction(BasePrediction):
    y: float


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(x=1)

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.factor = float((artifact_dir / "factor.txt").read_text())

    def predict(self, batch: list[Features]) -> list[Prediction]:
        return [Prediction(y=self.factor * row.x + len(row.note)) for row in batch]
"""
PUBLISH = """
import sys
from pathlib import Path
from app.artifacts import new_version

for argument in sys.argv[2:]:
    model, factor = argument.split("=")
    with new_version(Path(sys.argv[1]), model, input_schema={}) as folder:
        (folder / "factor.txt").write_text(factor)
"""


def factor(model: str, version: str) -> int:
    """What this version of this model multiplies by."""
    return 3 + 2 * MODELS.index(model) + 10 * VERSIONS.index(version)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Replica:
    """A service, and the version that it serves."""

    version: str
    server: Server
    clients: list[Client] = field(default_factory=list)

    async def metrics(self) -> dict[str, float]:
        client = Client(self.server.port)
        _, body = await client.ask(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
        client.close()
        lines = [line.rpartition(" ") for line in body.decode().splitlines() if line[:1] != "#"]
        return {name: float(value) for name, _, value in lines}


@dataclass
class Tally:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    cache: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    sent: int = 0


def body_of(chance: random.Random, rows: list[tuple[int, str]]) -> dict[str, Any]:
    """JSON that says `rows`, in one of the ways in which it can be written."""

    def features(x: int, note: str) -> dict[str, Any]:
        number = chance.choice((x, float(x)))
        fields = [("x", number)] + ([("note", note)] if note or chance.random() < 0.5 else [])
        chance.shuffle(fields)
        return dict(fields)

    written = [features(*row) for row in rows]
    return {"features": written[0]} if len(written) == 1 else {"instances": written}


async def call(replicas: list[Replica], tally: Tally, chance: random.Random) -> None:
    """One request, and whether its answer is right."""
    replica, model = chance.choice(replicas), chance.choice(MODELS)
    count = 1 if chance.random() < 0.8 else chance.randint(2, 8)
    # Small numbers are asked for often, large ones seldom.
    rows = [
        (int(ROWS * chance.random() ** 3), chance.choice(("", "", "a", "\u00e9")))
        for _ in range(count)
    ]
    body = json.dumps(body_of(chance, rows), indent=chance.choice((None, None, 1))).encode()
    control = chance.choices(("", "no-cache", "no-store"), (96, 2, 2))[0]
    extra = f"Cache-Control: {control}\r\n" if control else ""
    path = f"/v1/models/{model}/predict" + ("/batch" if count > 1 else "")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{extra}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    client = replica.clients.pop() if replica.clients else Client(replica.server.port)
    status, content = await client.ask(head.encode() + body)
    replica.clients.append(client)
    tally.statuses[status] += 1
    if status != 200:
        return
    answer = json.loads(content)
    said = answer["predictions"] if count > 1 else [answer["prediction"]]
    right = [{"y": factor(model, replica.version) * x + len(note)} for x, note in rows]
    if said != right or answer["model_version"] != replica.version:
        tally.wrong.append(f"{model} {replica.version} {rows}: {said}")


class Network:
    """Between the services and Redis; does to the answers what it is told."""

    def __init__(self, redis_port: int) -> None:
        self.treat: Treatment = unchanged
        self._redis_port = redis_port
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """At a port of its own, which it gives."""
        async with await asyncio.start_server(self._connected, "127.0.0.1", 0) as server:
            port: int = server.sockets[0].getsockname()[1]
            try:
                yield port
            finally:
                for connection in self._connections:
                    connection.cancel()

    def _connected(self, *client: *Streams) -> None:
        connection = asyncio.create_task(self._connect(*client))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connect(self, *client: *Streams) -> None:
        try:
            server = await asyncio.open_connection("127.0.0.1", self._redis_port)
        except OSError:
            client[1].transport.abort()
            return
        pumps = self._pump(client[0], server[1], unchanged), self._pump(server[0], client[1])
        await asyncio.gather(*pumps)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        treat: "Treatment | None" = None,
    ) -> None:
        try:
            while data := await source.read(65_536):
                treated = await (treat or self.treat)(data)
                if treated is None:
                    break
                target.write(treated)
                await target.drain()
        except OSError:
            pass
        finally:
            target.transport.abort()


Treatment = Callable[[bytes], Awaitable[bytes | None]]
"""What is to be sent in place of some bytes; None: the connection is reset."""


async def unchanged(data: bytes) -> bytes:
    return data


async def reset(_: bytes) -> None:
    pass


async def lose(_: bytes) -> bytes:
    return b""


async def halve(data: bytes) -> bytes:
    return data[: len(data) // 2]


async def garble(data: bytes) -> bytes:
    """What is no answer, or one of another kind than was asked for."""
    return random.choice((os.urandom(len(data)), b"+OK\r\n", b"*-1\r\n", b":7\r\n"))  # noqa: S311


def delay(seconds: float) -> Treatment:
    async def wait(data: bytes) -> bytes:
        await asyncio.sleep(seconds)
        return data

    return wait


@dataclass(frozen=True)
class Shared:
    """What the services share."""

    server: RedisProcess
    network: Network


Change = Callable[[Shared], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    title: str
    begin: Change
    end: Change


async def nothing(_: Shared) -> None:
    pass


async def stop(shared: Shared) -> None:
    shared.server.signal(signal.SIGSTOP)


async def go_on(shared: Shared) -> None:
    shared.server.signal(signal.SIGCONT)


async def kill(shared: Shared) -> None:
    shared.server.kill()


async def restart(shared: Shared) -> None:
    shared.server.start()


def treat(treatment: Treatment) -> Change:
    async def change(shared: Shared) -> None:
        shared.network.treat = treatment

    return change


def command(*words: str, password: str | None = None) -> Change:
    """Have Redis do what `words` say, and close all connections, so that all notice."""

    async def change(shared: Shared) -> None:
        async with redis.Redis.from_url(shared.server.url, password=password) as client:
            await client.execute_command(*words)  # type: ignore[no-untyped-call]
            await client.execute_command("CLIENT", "KILL", "TYPE", "normal")  # type: ignore[no-untyped-call]

    return change


async def empty(shared: Shared) -> None:
    async with redis.Redis.from_url(shared.server.url) as client:
        await client.flushall()


async def lie(shared: Shared) -> None:
    """Give each entry the value of another one, or garbage."""
    async with redis.Redis.from_url(shared.server.url) as client:
        names = [name async for name in client.scan_iter("prediction:*", count=1000)]
        values = await client.mget(names)
        commands = client.pipeline(transaction=False)
        for number, (name, value) in enumerate(zip(names, values[1:] + values[:1], strict=True)):
            lied = value if number % 2 and value else os.urandom(40)
            commands.set(name, lied, keepttl=True)
        await commands.execute()


def configure(**options: str) -> Change:
    async def change(shared: Shared) -> None:
        async with redis.Redis.from_url(shared.server.url) as client:
            for name, value in options.items():
                await client.config_set(name.replace("_", "-"), value)

    return change


FAULTS = [
    Fault("none", nothing, nothing),
    Fault("SIGSTOP", stop, go_on),
    Fault("SIGKILL, restarted empty", kill, restart),
    Fault("FLUSHALL", empty, nothing),
    Fault("every value replaced by another's or by garbage", lie, nothing),
    Fault(
        "full, `noeviction`",
        configure(maxmemory="1", maxmemory_policy="noeviction"),
        configure(maxmemory="0"),
    ),
    Fault(
        "1.5 MB, `allkeys-lru`",
        configure(maxmemory="1500000", maxmemory_policy="allkeys-lru"),
        configure(maxmemory="0"),
    ),
    Fault(
        "read-only",
        command("REPLICAOF", "127.0.0.1", "1"),
        command("REPLICAOF", "NO", "ONE"),
    ),
    Fault(
        "wrong password",
        command("CONFIG", "SET", "requirepass", PASSWORD),
        command("CONFIG", "SET", "requirepass", "", password=PASSWORD),
    ),
    *(
        Fault(title, treat(treatment), treat(unchanged))
        for title, treatment in (
            ("connections reset", reset),
            ("answers lost", lose),
            ("answers 20 ms late, in time", delay(0.02)),
            ("answers 200 ms late", delay(0.2)),
            ("half answers", halve),
            ("garbage for answers", garble),
        )
    ),
    Fault("none", nothing, nothing),
]


def is_in_use(metrics: dict[str, float], *operations: str) -> bool:
    """Whether a service with such metrics uses Redis for all of `operations`."""
    return all(metrics[f'cache_redis_breaker_state{{operations="{of}"}}'] == 0 for of in operations)


async def recovery_s(replicas: list[Replica]) -> float:
    """Seconds until every service uses Redis again, for lookups and for writes."""
    started = monotonic()
    while monotonic() < started + 60:
        states = [await replica.metrics() for replica in replicas]
        if all(is_in_use(metrics, "lookups", "writes") for metrics in states):
            return monotonic() - started
        await asyncio.sleep(0.02)
    return float("inf")


@dataclass
class Phase:
    title: str
    tally: Tally
    rows: dict[str, float]
    """Found in memory, found in Redis, and not found."""

    recovery_s: float

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.tally.statuses.items() if status != 200)

    def as_row(self) -> list[str]:
        rows = [f"{self.rows[name]:,.0f}" for name in TOTALS]
        counts = [f"{self.tally.sent:,}", f"{self.failed}", f"{len(self.tally.wrong)}"]
        return [self.title, *counts, *rows, f"{self.recovery_s:.2f}"]


TOTALS = ("memory", "redis", "misses")


async def totals(replicas: list[Replica]) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys(TOTALS, 0.0)
    for replica in replicas:
        for name, value in (await replica.metrics()).items():
            for total in TOTALS:
                is_hit = name.startswith("cache_hits_total") and f'tier="{total}"' in name
                if is_hit or (total == "misses" and name.startswith("cache_misses_total")):
                    found[total] += value
    return found


async def callers(
    replicas: list[Replica],
    tally: Tally,
    chance: random.Random,
    go_on: Callable[[], bool],
) -> None:
    async def one() -> None:
        while go_on():
            tally.sent += 1
            await call(replicas, tally, chance)

    await asyncio.gather(*(one() for _ in range(CALLERS)))


async def run_beside(
    fault: Fault, replicas: list[Replica], shared: Shared, chance: random.Random, count: int
) -> tuple[Tally, float]:
    """At least `count` requests, and the seconds that it took to recover."""
    tally = Tally()
    await fault.begin(shared)
    await callers(replicas, tally, chance, lambda: tally.sent < count // 2)
    await fault.end(shared)
    # It is the requests by which a service finds out that Redis is well.
    recovery = asyncio.create_task(recovery_s(replicas))
    await callers(replicas, tally, chance, lambda: tally.sent < count or not recovery.done())
    return tally, await recovery


async def run(replicas: list[Replica], shared: Shared, count: int) -> list[Phase]:
    chance = random.Random(SEED)  # noqa: S311
    phases = []
    for fault in FAULTS:
        before = await totals(replicas)
        tally, seconds = await run_beside(fault, replicas, shared, chance, count // len(FAULTS))
        after = await totals(replicas)
        more = {name: after[name] - before[name] for name in TOTALS}
        phases.append(Phase(fault.title, tally, more, seconds))
        print(" | ".join(phases[-1].as_row()), *tally.wrong[:3], sep="\n  ", flush=True)
    return phases


def publish(place: Place, folder: Path) -> dict[str, Path]:
    """The folder of artifacts of each version, beside the predictors of all."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "predictors").mkdir(parents=True)
    for model in MODELS:
        (folder / "predictors" / f"{model}.py").write_text(PREDICTOR)
    for number, version in enumerate(VERSIONS):
        for earlier in VERSIONS[: number + 1]:
            factors = [f"{model}={factor(model, earlier)}" for model in MODELS]
            arguments = [str(place.python), "-c", PUBLISH, str(folder / version), *factors]
            subprocess.run(arguments, cwd=place.home / SLUG, check=True)
    return {version: folder / version for version in VERSIONS}


def start(
    place: Place, artifacts: Path, settings: dict[str, str], log: Path, cpus: list[int]
) -> Server:
    port = free_port()
    environment = settings | {
        "PREDICTORS_DIR": str(artifacts.parent / "predictors"),
        "ARTIFACTS_DIR": str(artifacts),
        "DEFAULT_MODEL": MODELS[0],
        "BIND_ADDRESS": "127.0.0.1",
        "PORT": str(port),
    }
    arguments = Command([str(place.python), "-m", "app"], place.home / SLUG, environment)
    return Server(arguments, "/ready", port, log, cpus)


async def beside_faults(
    place: Place, artifacts: dict[str, Path], stack: ExitStack, count: int
) -> list[Phase]:
    server = stack.enter_context(redis_server(CORES.server))
    network = Network(server.port)
    async with network.listening() as port:
        # Most of what is asked for again is to come from Redis.
        settings = {"REDIS_URL": f"redis://127.0.0.1:{port}", "CACHE_MAX_BYTES": "100000"}
        replicas = []
        for number, version in enumerate(VERSIONS * REPLICAS):
            log = BUILD / "logs" / f"shared-cache-{number}.log"
            # The network goes on meanwhile.
            begun = await asyncio.to_thread(
                start, place, artifacts[version], settings, log, CORES.server
            )
            replicas.append(Replica(version, stack.enter_context(begun)))
        return await run(replicas, Shared(server, network), count)


async def beside_hangs(place: Place, artifacts: Path, stack: ExitStack) -> list[hung_redis.Waits]:
    cores, version = split_cores(), VERSIONS[-1]
    server = stack.enter_context(redis_server(cores.load))
    log = BUILD / "logs" / "hung-redis.log"
    settings = {"REDIS_URL": server.url, "CACHE_MAX_BYTES": "0"}
    begun = start(place, artifacts, settings, log, cores.server)
    replica = Replica(version, stack.enter_context(begun))

    async def recovered() -> bool:
        # It is empty at first. To try writes again takes one, and all is known.
        is_known = await asyncio.to_thread(server.size) >= hung_redis.KNOWN_ROWS
        return is_known and is_in_use(await replica.metrics(), "lookups")

    port = replica.server.port
    with running_on(cores.load):
        return await hung_redis.measure(port, factor(MODELS[0], version), server, recovered)


def as_markdown(phases: list[Phase], commit_id: str) -> str:
    sent = sum(phase.tally.sent for phase in phases)
    failed = sum(phase.failed for phase in phases)
    wrong = sum(len(phase.tally.wrong) for phase in phases)
    slowest = max(phase.recovery_s for phase in phases)
    about = (
        f"Written by `make bench-shared-cache` on {datetime.now(UTC).date()}, commit {commit_id}. "
        f"{len(MODELS)} models in {len(VERSIONS)} versions, {REPLICAS} services of each version, "
        f"{CALLERS} callers; {ROWS:,} numbers, of which some are asked for often, each written "
        "in several ways; a fifth of the requests have 2 to 8 rows, 4% a Cache-Control. "
        "Each model and version multiplies by a number of its own. What happens to Redis "
        "lasts for the first half of the requests beside it.\n"
    )
    result = (
        f"**{sent:,} requests, {failed} failed, {wrong} wrong answers.** All services used a "
        f"Redis that was well again within {slowest:.1f} s (wanted: {RECOVERY_S} s).\n"
    )
    head = ["what happens to Redis", "requests", "failed", "wrong answers"]
    head += ["rows from memory", "rows from Redis", "rows not known", "in use again after s"]
    rows = table(head, [phase.as_row() for phase in phases])
    return f"# One Redis for three models in two versions\n\n{about}\n{result}\n{rows}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_cache", description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("shared_cache.md"))
    arguments = parser.parse_args()
    place = make_place(OURS, REPOSITORY)
    artifacts = publish(place, BUILD / "shared-cache")
    with ExitStack() as stack:
        phases = asyncio.run(beside_faults(place, artifacts, stack, arguments.requests))
    with ExitStack() as stack:
        waits = asyncio.run(beside_hangs(place, artifacts[VERSIONS[-1]], stack))
    hangs = hung_redis.as_markdown(waits)
    arguments.output.write_text(f"{as_markdown(phases, commit(REPOSITORY))}\n{hangs}")
    print(f"\nwrote {os.path.relpath(arguments.output)}")
    is_right = not any(phase.failed or phase.tally.wrong for phase in phases)
    is_right &= not any(wait.failed for wait in waits)
    sys.exit(not (is_right and all(phase.recovery_s <= RECOVERY_S for phase in phases)))


if __name__ == "__main__":
    main()
