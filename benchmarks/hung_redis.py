"""What callers wait for while Redis hangs, which is a part of `make bench-shared-cache`.

Every row is known to Redis and to nobody else, so that each request asks it. Requests are due at
random times that do not depend on the answers, and latency counts from when a request was due.
"""

import asyncio
import json
import random
import signal
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from time import perf_counter

from benchmarks.contestants import Request
from benchmarks.fire import Client, is_right
from benchmarks.load import Exchange, percentile_ms
from benchmarks.redis_server import RedisProcess
from benchmarks.report import table
from benchmarks.sections import http_bytes

RATES = (400, 1000)
"""Requests a second. With many more it is not asked for all of them while it hangs, as too many
would be in vain."""

HANGS = 5
KNOWN_ROWS = 200
STEPS_S = (0.5, 1.5, 1.75, 1.8, 2.8)
"""Of a hang, from when requests begin: what comes from the first to the second is before it; to the
third, until the breaker opens, after three exchanges of 50 ms; from the fourth to the last, after
that. Then Redis goes on."""

BEFORE, OPENING, AFTER = 1, 2, 4
SEED = 20_261_130


@dataclass
class Waits:
    rate: int
    seconds: dict[int, list[list[float]]] = field(
        default_factory=lambda: {BEFORE: [], OPENING: [], AFTER: []}
    )
    """By steps, of each hang."""

    failed: int = 0

    def p99_ms(self, step: int) -> float:
        """The median of the hangs: now and then the machine itself stands still."""
        return median(percentile_ms(sorted(of_one), 0.99) or 0.0 for of_one in self.seconds[step])

    def as_row(self) -> list[str]:
        before = self.p99_ms(BEFORE)
        hung = [
            f"{value:.1f}"
            for step in (OPENING, AFTER)
            for value in (self.p99_ms(step), self.p99_ms(step) - before)
        ]
        counts = f"{sum(map(len, chain(*self.seconds.values()))):,}", f"{self.failed}"
        return [f"{self.rate:,}", *counts, f"{before:.1f}", *hung]


def exchange_of(x: int, factor: int) -> Exchange:
    path = ("prediction", "y")
    content = json.dumps({"features": {"x": x}}).encode()
    request = Request("/v1/predict", "application/json", content, path)
    return Exchange(http_bytes(request), [(path, factor * x)])


class Callers:
    """Ask the service at `port`, each over a connection that another has left or a new one."""

    def __init__(self, port: int, factor: int) -> None:
        self.exchanges = [exchange_of(x, factor) for x in range(KNOWN_ROWS)]
        self._port = port
        self._free: list[Client] = []

    async def is_right(self, exchange: Exchange) -> bool:
        client = self._free.pop() if self._free else Client(self._port)
        answered = await is_right(client, exchange)
        self._free.append(client)
        return answered

    async def ask(self, exchange: Exchange, waits: Waits, due: float, step: int) -> None:
        waits.failed += not await self.is_right(exchange)
        if step in waits.seconds:
            waits.seconds[step][-1].append(perf_counter() - due)


async def beside_a_hang(
    callers: Callers, server: RedisProcess, waits: Waits, chance: random.Random
) -> None:
    for of_all in waits.seconds.values():
        of_all.append([])
    started = perf_counter()
    due, asking = started, []
    is_hung = False
    while due < started + STEPS_S[-1]:
        due += chance.expovariate(waits.rate)
        await asyncio.sleep(max(0.0, due - perf_counter()))
        if not is_hung and due >= started + STEPS_S[BEFORE]:
            server.signal(signal.SIGSTOP)
            is_hung = True
        step = bisect_right(STEPS_S, due - started)
        exchange = chance.choice(callers.exchanges)
        asking.append(asyncio.create_task(callers.ask(exchange, waits, due, step)))
    server.signal(signal.SIGCONT)
    await asyncio.gather(*asking)


async def measure(
    port: int, factor: int, server: RedisProcess, recovered: Callable[[], Awaitable[bool]]
) -> list[Waits]:
    callers, found = Callers(port, factor), []
    chance = random.Random(SEED)  # noqa: S311
    for rate in RATES:
        waits = Waits(rate)
        for _ in range(HANGS):
            while not await recovered():
                # It is by requests that the service finds out.
                waits.failed += sum(
                    [not await callers.is_right(each) for each in callers.exchanges]
                )
            await beside_a_hang(callers, server, waits, chance)
        found.append(waits)
        print(" | ".join(waits.as_row()), flush=True)
    return found


def as_markdown(found: list[Waits]) -> str:
    about = (
        f"One service, with Redis alone (CACHE_MAX_BYTES=0), which has all {KNOWN_ROWS} rows that "
        f"are asked for. It hangs (SIGSTOP) {HANGS} times at each rate: p99 in ms, "
        f"medians of the hangs, of what is due "
        f"in the second before, in the {1000 * (STEPS_S[2] - STEPS_S[1]):.0f} ms until the breaker "
        "is open, and in a second after that, in which it is tried again.\n"
    )
    head = ["req/s", "requests", "failed or wrong", "before", "until the breaker opens", "added"]
    rows = [waits.as_row() for waits in found]
    return f"## A Redis that hangs\n\n{about}\n" + table([*head, "after that", "added"], rows)
