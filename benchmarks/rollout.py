"""Rolling restarts through a proxy, and killed workers: `make bench-rollout`.

What a Deployment does with the manifest's numbers, done with processes on this machine: a new pod
is started, and has its share once it is ready; an old one is taken off the list of addresses some
time after it was told to go, waits for its preStop, gets SIGTERM and ends. HAProxy is the proxy. It
tries nothing twice, so what is lost is seen. Bounded in number; it ends only processes that it has
started.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from time import monotonic

import yaml

from benchmarks.contestants import Command, Place, contestants
from benchmarks.environments import BUILD, MODELS, REPOSITORY, make_place
from benchmarks.fire import Client, said
from benchmarks.load import Exchange
from benchmarks.machine import commit
from benchmarks.report import table
from benchmarks.sections import OURS, exchanges_of
from benchmarks.servers.template.contestant import SLUG
from benchmarks.serving import Server, descendants, free_port, shared_cores, status
from benchmarks.workloads import make_models, make_workload

REQUESTS = 50_000
RESTARTS = 5
CALLERS = 32
PAUSE_S = 0.05
"""Longest pause between an answer and the same caller's next request: idle connections, too."""

UNTOLD_S = 4
"""Longest until the proxy knows that a pod is to go; preStop is to be longer."""

RECOVERY_S = 3
"""The time that the issue gives a service to have all of its workers again."""

MODELS_OF_KILLS = {"w1": "W1, ONNX", "fire": "W2, scikit-learn"}
"""What a worker has to import and load decides how long it takes."""

NEW_CONNECTION_AFTER = 20
RATE_S = 2
ESTABLISHED = "01"
"""A state in /proc/net/tcp."""

CORES = shared_cores()

HAPROXY = """
global
  maxconn 2000
  stats socket {socket} mode 600 level admin
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 30s
  timeout http-keep-alive 60s
  retries 0
frontend all
  bind 127.0.0.1:{port}
  default_backend pods
backend pods
  balance roundrobin
  http-reuse always
"""


class Proxy:
    """HAProxy before a number of addresses, which are turned on and off."""

    def __init__(self, ports: list[int]) -> None:
        self.port = free_port()
        folder = BUILD / "haproxy"
        folder.mkdir(parents=True, exist_ok=True)
        self._socket = folder / "admin"
        config = HAPROXY.format(socket=self._socket, port=self.port)
        config += "".join(f"  server p{port} 127.0.0.1:{port} disabled\n" for port in ports)
        (folder / "haproxy.cfg").write_text(config)
        command = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while status(self.port, "/health") is None:
            if self._process.poll() is not None:
                raise RuntimeError("haproxy has ended; see build/bench/haproxy/haproxy.cfg")

    def send_to(self, port: int, *, on: bool) -> None:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self._socket))
            admin.sendall(f"set server pods/p{port} state {'ready' if on else 'maint'}\n".encode())
            answer = admin.recv(1000).strip()
        if answer:
            raise RuntimeError(answer.decode())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def proxy_before(ports: list[int]) -> Iterator[Proxy]:
    proxy = Proxy(ports)
    try:
        yield proxy
    finally:
        proxy.close()


@dataclass(frozen=True)
class Service:
    """How a pod of ours is started, what it is asked, and what its manifest says."""

    place: Place
    model: str
    exchanges: list[Exchange]

    def start(self, port: int, **environment: str) -> Server:
        """It, once it is ready."""
        contestant = contestants()[OURS]
        command = contestant.start(self.place, self.model, port)
        command = Command(command.arguments, command.folder, command.environment | environment)
        log = BUILD / "logs" / f"rollout-{port}.log"
        return Server(command, "/ready", port, log, CORES.server)

    @property
    def pre_stop_s(self) -> float:
        path = self.place.home / SLUG / "deploy/kubernetes/base/deployment.yaml"
        pod = yaml.safe_load(path.read_text())["spec"]["template"]["spec"]
        seconds: float = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        return seconds


@dataclass
class Tally:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0

    @property
    def answered(self) -> int:
        return self.statuses[200] - self.wrong

    @property
    def sent(self) -> int:
        return self.statuses.total()


async def call(service: Service, port: int, tally: Tally, go_on: Callable[[], bool]) -> None:
    """One caller, on a connection that it keeps for as long as the other side does."""
    chance = random.Random()  # noqa: S311
    client = Client(port)
    exchanges = cycle(chance.sample(service.exchanges, len(service.exchanges)))
    while go_on():
        exchange = next(exchanges)
        code, content = await client.ask(exchange.request)
        tally.statuses[code] += 1
        tally.wrong += code == 200 and exchange.fault(content, 1e-5) is not None
        await asyncio.sleep(chance.random() * PAUSE_S)
    client.close()


async def beside(
    service: Service, port: int, at_least: int, event: Callable[[], Awaitable[None]]
) -> Tally:
    """What callers see while `event` goes on, and until there were `at_least` requests."""
    tally = Tally()
    happening = asyncio.ensure_future(event())

    def go_on() -> bool:
        return tally.sent < at_least or not happening.done()

    await asyncio.gather(happening, *(call(service, port, tally, go_on) for _ in range(CALLERS)))
    return tally


class Fleet:
    """The pods of a Deployment, behind a proxy."""

    def __init__(self, service: Service, proxy: Proxy, ports: list[int]) -> None:
        self._service = service
        self._proxy = proxy
        self._free = ports
        self.pods: list[Server] = []
        self.slowest_stop_s = 0.0
        self.exit_codes: Counter[int] = Counter()

    async def add(self) -> None:
        """One more that answers."""
        port = self._free.pop(0)
        pod = await asyncio.to_thread(self._service.start, port)
        self._proxy.send_to(port, on=True)
        self.pods.append(pod)

    async def remove(self, pod: Server) -> None:
        """As the kubelet does, while the proxy hears of it in its own time."""
        self.pods.remove(pod)

        async def tell() -> None:
            await asyncio.sleep(random.random() * UNTOLD_S)  # noqa: S311
            self._proxy.send_to(pod.port, on=False)

        telling = asyncio.create_task(tell())
        await asyncio.sleep(self._service.pre_stop_s)
        self.slowest_stop_s = max(self.slowest_stop_s, await asyncio.to_thread(pod.stop))
        self.exit_codes[pod.process.returncode] += 1
        await telling
        self._free.append(pod.port)

    async def restart(self) -> None:
        """Each for a new one: first one more, then one less."""
        going = []
        for pod in list(self.pods):
            await self.add()
            going.append(asyncio.create_task(self.remove(pod)))
        await asyncio.gather(*going)


@dataclass(frozen=True)
class Result:
    title: str
    tally: Tally
    slowest_stop_s: float
    exit_codes: Counter[int]

    @property
    def lost(self) -> int:
        return self.tally.sent - self.tally.answered

    @property
    def is_right(self) -> bool:
        return self.lost == 0 and set(self.exit_codes) == {0}

    def as_row(self) -> list[str]:
        tally = self.tally
        counts = [f"{tally.sent:,}", f"{self.lost}", said(tally.statuses), f"{tally.wrong}"]
        return [self.title, *counts, f"{self.slowest_stop_s:.1f}", said_codes(self.exit_codes)]


def said_codes(codes: Counter[int]) -> str:
    return ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))


async def restarts(service: Service, replicas: int, times: int, requests: int) -> Result:
    # The first free one is the proxy's.
    ports = [free_port() + 1 + number for number in range(2 * replicas + 1)]
    with proxy_before(ports) as proxy:
        fleet = Fleet(service, proxy, ports)
        try:
            for _ in range(replicas):
                await fleet.add()

            async def event() -> None:
                for _ in range(times):
                    await fleet.restart()

            tally = await beside(service, proxy.port, requests, event)
        finally:
            for pod in fleet.pods:
                pod.stop()
    title = f"{replicas} replica{'s' if replicas > 1 else ''}, one more while it goes on"
    return Result(title, tally, fleet.slowest_stop_s, fleet.exit_codes)


@dataclass(frozen=True)
class Kill:
    model: str
    in_flight: int
    """The connections of the killed worker: on each a caller waits, or is about to ask."""

    statuses: Counter[int]
    back_s: float
    """From the kill until as many workers as before had callers."""

    rate_before: float
    rate_after: float
    """Answers per second, in the two seconds before the kill and after the worker was back."""

    @property
    def failed(self) -> int:
        return self.statuses.total() - self.statuses[200]

    @property
    def is_right(self) -> bool:
        return self.failed <= self.in_flight and self.back_s <= RECOVERY_S

    def as_row(self) -> list[str]:
        rates = [f"{self.rate_before:,.0f}", f"{self.rate_after:,.0f}"]
        counts = [f"{self.in_flight}", f"{self.failed}", said(self.statuses)]
        return [MODELS_OF_KILLS[self.model], *counts, f"{self.back_s:.2f}", *rates]


async def ask_on_one_connection(
    port: int, exchanges: list[Exchange], statuses: Counter[int]
) -> None:
    """Without a pause, and not for long, so that all workers get some callers."""
    client = Client(port)
    for exchange in random.sample(exchanges, NEW_CONNECTION_AFTER):
        code, content = await client.ask(exchange.request)
        if code == 200 and exchange.fault(content, 1e-5):
            code = -1
        statuses[code] += 1
    client.close()


def connections(pid: int, port: int) -> set[int]:
    """The other ends' ports of what `pid` has accepted at `port`."""
    inodes = set()
    # It may end while it is looked at.
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(path.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        is_accepted = fields[3] == ESTABLISHED and int(fields[1].split(":")[1], 16) == port
        if is_accepted and fields[9] in inodes:
            found.add(int(fields[2].split(":")[1], 16))
    return found


async def kill(service: Service) -> Kill:
    """SIGKILL to one of two workers, while all callers wait for answers."""
    port = free_port()
    server = await asyncio.to_thread(service.start, port, WEB_CONCURRENCY="2")
    statuses: Counter[int] = Counter()
    is_over = False

    async def go_on() -> None:
        while not is_over:
            await ask_on_one_connection(port, service.exchanges, statuses)

    async def rate() -> float:
        before = statuses[200]
        await asyncio.sleep(RATE_S)
        return (statuses[200] - before) / RATE_S

    def workers() -> dict[int, set[int]]:
        pids = descendants(server.process.pid)
        return {pid: found for pid in pids if (found := connections(pid, port))}

    tasks = [asyncio.create_task(go_on()) for _ in range(CALLERS)]
    try:
        while len(workers()) < 2:
            await asyncio.sleep(0.01)
        rate_before = await rate()
        victim = max(found := workers(), key=lambda pid: len(found[pid]))
        # Held still while it is looked at.
        os.kill(victim, signal.SIGSTOP)
        in_flight = len(connections(victim, port))
        os.kill(victim, signal.SIGKILL)
        killed = monotonic()
        while len(set(workers()) - {victim}) < 2 and monotonic() < killed + 60:
            await asyncio.sleep(0.01)
        back_s = monotonic() - killed
        rate_after = await rate()
    finally:
        is_over = True
        await asyncio.gather(*tasks)
        server.stop()
    return Kill(service.model, in_flight, statuses, back_s, rate_before, rate_after)


def as_markdown(results: list[Result], kills: list[Kill], commit_id: str) -> str:
    about = (
        f"Written by `make bench-rollout` on {datetime.now(UTC).date()}, commit {commit_id}. The "
        "model is the random forest of W2, in the default project, where no other is named.\n"
    )
    rolling = (
        f"{RESTARTS} restarts each, {CALLERS} callers on connections that they keep, with pauses "
        f"of up to {PAUSE_S * 1000:.0f} ms. The proxy hears that a pod is to go within "
        f"{UNTOLD_S} s, SIGTERM comes after the manifest's preStop, and HAProxy tries nothing "
        "twice. Lost is all that has no right answer.\n"
    )
    head = ["", "requests", "lost", "statuses", "wrong answers", "slowest stop s", "exit codes"]
    killing = (
        "SIGKILL to one of two workers that answer "
        f"{CALLERS} callers without a pause, each of whom makes a new connection after "
        f"{NEW_CONNECTION_AFTER} requests. In flight are the worker's connections, on each of "
        "which a caller waits or is about to ask. It is back when as many as before have some.\n"
    )
    kill_head = ["model", "in flight", "failed", "statuses", "back after s"]
    kill_head += ["req/s before", "and after"]
    return "\n".join(
        [
            "# Rolling restarts and killed workers\n",
            about,
            "## Rolling restarts\n",
            rolling,
            table(head, [result.as_row() for result in results]),
            "## A killed worker\n",
            killing,
            table(kill_head, [found.as_row() for found in kills]),
        ]
    )


async def run(place: Place, times: int, requests: int) -> tuple[list[Result], list[Kill]]:
    results, kills = [], []
    for replicas in (2, 1):
        results.append(await restarts(serving(place, "fire"), replicas, times, requests))
        print(" | ".join(results[-1].as_row()), flush=True)
    for model in MODELS_OF_KILLS:
        for _ in range(times):
            kills.append(await kill(serving(place, model)))
            print(" | ".join(kills[-1].as_row()), flush=True)
    return results, kills


def serving(place: Place, model: str) -> Service:
    workload = make_workload(model, MODELS)
    return Service(place, model, exchanges_of(contestants()[OURS], workload))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--restarts", type=int, default=RESTARTS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("rollout.md"))
    arguments = parser.parse_args()
    if not shutil.which("haproxy"):
        sys.exit("haproxy is not installed: apt-get install haproxy")
    BUILD.mkdir(parents=True, exist_ok=True)
    make_models(MODELS)
    place = make_place(OURS, REPOSITORY)
    results, kills = asyncio.run(run(place, arguments.restarts, arguments.requests))
    arguments.output.write_text(as_markdown(results, kills, commit(REPOSITORY)))
    print(f"\nwrote {os.path.relpath(arguments.output)}")
    is_right = all(result.is_right for result in results) and all(one.is_right for one in kills)
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
