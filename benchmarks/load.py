"""The load generator: a process of its own that sends prepared requests and times the answers.

It asks one server, or several by turns of a fraction of a second: a machine that others use as well
is as slow for one of them then as for the next.

Standard library only, so that it starts at once. One thread, epoll on non-blocking sockets, whole
requests prepared as bytes; of an answer it reads status and Content-Length, and keeps a sample
whose scores it compares when the clock has stopped.

Closed loop: each connection sends its next request when it has its answer; the clock starts when
all have had one, as before that a server cannot know how many there are. Open loop: requests
are due at random times (Poisson) that do not depend on the answers, and latency counts from when
a request was due, so that a server which stalls is charged for everyone whom it kept waiting.
"""

import base64
import gc
import json
import os
import random
import re
import select
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, Self

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
SAMPLE_EVERY = 20
"""Of so many answers, one has its scores compared."""

MAX_SAMPLES = 2000
PATIENCE_S = 30.0
"""After the last request was sent, so long do we wait for the answers that are due."""

RECEIVE_BYTES = 65_536
SEED = 20_261_122

AnswerPath = Sequence[str | int]


@dataclass(frozen=True)
class Exchange:
    """A whole HTTP request, and the scores that its answer has to have, with their places."""

    request: bytes
    scores: list[tuple[AnswerPath, float]]

    def fault(self, content: bytes, tolerance: float) -> str | None:
        """What is wrong with the body of an answer."""
        try:
            answer = json.loads(content)
            for path, expected in self.scores:
                score = answer
                for step in path:
                    score = score[step]
                if not abs(score - expected) <= tolerance:
                    return f"{score} in place of {expected}"
        except (ValueError, LookupError, TypeError) as error:
            return f"{error!r} in {content[:200]!r}"
        return None


@dataclass(frozen=True)
class Plan:
    port: int
    exchanges: list[Exchange]
    seconds: float
    connections: int
    """In a closed loop, how many are busy; in an open one, how many there may be at most."""

    rate: float | None = None
    """Requests a second; None is a closed loop."""

    tolerance: float = 1e-5
    cpus: list[int] | None = None
    """Where the load generator runs."""

    may_spin: bool = False
    """Whether it has its CPU to itself, and may wait there for the next request to be due.
    If not, open-loop requests are sent up to 1 ms late, which counts as latency."""

    turns: int = 1
    """Into which its time is cut. In each, all that was sent is waited for."""

    def to_dict(self) -> dict[str, Any]:
        plan = asdict(self)
        for exchange in plan["exchanges"]:
            exchange["request"] = base64.b64encode(exchange["request"]).decode()
        return plan

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> Self:
        exchanges = [
            Exchange(base64.b64decode(exchange["request"]), exchange["scores"])
            for exchange in plan["exchanges"]
        ]
        return cls(**plan | {"exchanges": exchanges})


@dataclass
class Result:
    """Latencies in ms. `lost` requests were sent and never answered."""

    seconds: float
    sent: int
    per_s: float
    """Answers with status 200 a second, in the time planned."""

    turns_per_s: list[float]
    """The same in each turn."""

    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    usual_p99_ms: float | None
    """The median of each turn's: where the machine stalls, one turn has it all."""

    statuses: dict[str, int]
    lost: int
    unsent: int
    """In an open loop, requests that were due and found no connection."""

    refused_connections: int
    checked: int
    wrong: int
    fault: str | None
    """Of the first wrong answer, or the first one with an unexpected status."""

    refusals_p50_ms: float | None
    """Of the answers with status 429 and 503."""

    refusals_p99_ms: float | None
    refusals_without_retry_after: int
    busy: float
    """The part of the time for which the load generator had its CPU; in an open loop it spins. Of
    all that were asked by turns."""

    @property
    def is_clean(self) -> bool:
        """Whether every request was answered with 200 and no sampled score was wrong."""
        return not (self.lost or self.wrong or self.unsent or set(self.statuses) - {"200"})


@dataclass(eq=False, slots=True)
class Connection:
    socket: socket.socket
    exchange: int = -1
    due: float = 0.0
    outgoing: memoryview | None = None
    received: bytes = b""
    is_busy: bool = False


@dataclass
class _Tally:
    due: int = 0
    """In an open loop."""

    sent: int = 0
    in_time: int = 0
    turns: list[int] = field(default_factory=list)
    """`in_time` of each."""

    turns_p99_ms: list[float] = field(default_factory=list)
    """Of those with answers."""

    lost: int = 0
    refused_connections: int = 0
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    statuses: Counter[bytes] = field(default_factory=Counter)
    samples: list[tuple[int, bytes]] = field(default_factory=list)
    fault: str | None = None


class Load:
    """Carries out one plan, a turn at a time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = _Tally()
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._free: list[Connection] = []
        self._requests = [exchange.request for exchange in plan.exchanges]
        self._next = 0
        self._arrivals = random.Random(SEED)  # noqa: S311  # The same for every contestant.
        self._end = 0.0

    def begin(self) -> None:
        if self.plan.rate is None:
            self._connect_all()

    def take_turn(self) -> None:
        before, answered = self.tally.in_time, len(self.tally.latencies)
        started = perf_counter()
        self._end = started + self.plan.seconds / self.plan.turns
        if self.plan.rate is None:
            self._run_closed()
        else:
            self._run_open(started, self.plan.rate)
        self.tally.turns.append(self.tally.in_time - before)
        p99_ms = percentile_ms(sorted(self.tally.latencies[answered:]), 0.99)
        if p99_ms is not None:
            self.tally.turns_p99_ms.append(p99_ms)

    def end(self, busy: float) -> Result:
        for connection in self._connections.values():
            self.tally.lost += connection.is_busy
            connection.socket.close()
        return self._result(busy)

    def _connect_all(self) -> None:
        self._end = inf
        for _ in range(self.plan.connections):
            self._send(self._open(), perf_counter())
        self._await_answers(perf_counter() + PATIENCE_S)
        # What goes wrong counts from the beginning.
        self.tally.in_time = 0
        self.tally.latencies.clear()

    def _run_closed(self) -> None:
        patience = self._end + PATIENCE_S
        while self._connections and (now := perf_counter()) < patience:
            if now < self._end:
                free, self._free = self._free, []
                for connection in free:
                    self._send(connection, now)
            elif len(self._free) == len(self._connections):
                return
            self._handle_events(timeout=0.05)

    def _await_answers(self, patience: float) -> None:
        while len(self._free) < len(self._connections) and perf_counter() < patience:
            self._handle_events(timeout=0.05)

    def _run_open(self, started: float, rate: float) -> None:
        schedule = []
        due = started
        while (due := due + self._arrivals.expovariate(rate)) < self._end:
            schedule.append(due)
        self.tally.due += len(schedule)
        first_waiting = 0
        while first_waiting < len(schedule):
            now = perf_counter()
            if now >= self._end:
                break
            while first_waiting < len(schedule) and schedule[first_waiting] <= now:
                if self._free:
                    connection = self._free.pop()
                elif len(self._connections) < self.plan.connections:
                    connection = self._open()
                else:
                    break
                self._send(connection, schedule[first_waiting])
                first_waiting += 1
            self._handle_events(self._pause(schedule, first_waiting))
        self._await_answers(self._end + PATIENCE_S)

    def _pause(self, schedule: list[float], first_waiting: int) -> float:
        """How long to wait for events. epoll rounds up to whole milliseconds, so what is left
        of a millisecond is spun away where that disturbs nobody."""
        if first_waiting == len(schedule):
            return 0.01
        pause = schedule[first_waiting] - perf_counter()
        if self.plan.may_spin:
            return int(pause * 1000) / 1000 if pause > 0 else 0
        return max(pause, 0.0005)

    def _open(self) -> Connection:
        opened = socket.socket()
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(opened)
        self._connections[opened.fileno()] = connection
        opened.connect_ex(("127.0.0.1", self.plan.port))
        self._epoll.register(opened, select.EPOLLIN)
        return connection

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.socket.fileno()]
        connection.socket.close()

    def _send(self, connection: Connection, due: float) -> None:
        self._next = (self._next + 1) % len(self._requests)
        connection.exchange = self._next
        connection.due = due
        connection.is_busy = True
        self.tally.sent += 1
        request = self._requests[self._next]
        try:
            sent = connection.socket.send(request)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._lose(connection, error)
            return
        if sent < len(request):
            connection.outgoing = memoryview(request)[sent:]
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def _send_on(self, connection: Connection, outgoing: memoryview) -> None:
        try:
            outgoing = outgoing[connection.socket.send(outgoing) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(connection, error)
            return
        connection.outgoing = outgoing or None
        if not outgoing:
            self._epoll.modify(connection.socket, select.EPOLLIN)

    def _handle_events(self, timeout: float) -> None:
        for number, event in self._epoll.poll(timeout):
            connection = self._connections.get(number)
            if connection is None:
                continue
            if event & select.EPOLLOUT and connection.outgoing is not None:
                self._send_on(connection, connection.outgoing)
            # It may be gone by now, and a new one have its number.
            if event & ~select.EPOLLOUT and self._connections.get(number) is connection:
                self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(connection, error)
            return
        if not data:
            self._lose(connection)
            return
        if connection.received:
            data = connection.received + data
        head = data.find(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(data, 0, head) if head >= 0 else None
        if length is None and head >= 0:
            raise SystemExit(f"an answer without Content-Length: {data[:200]!r}")
        if length is None or len(data) < head + 4 + int(length[1]):
            connection.received = data
            return
        self._answered(connection, data, head)

    def _answered(self, connection: Connection, data: bytes, head: int) -> None:
        now = perf_counter()
        tally, status = self.tally, data[9:12]
        tally.statuses[status] += 1
        latency = now - connection.due
        connection.received = b""
        connection.is_busy = False
        if status == b"200":
            tally.in_time += now <= self._end
            tally.latencies.append(latency)
            if len(tally.latencies) % SAMPLE_EVERY == 0 and len(tally.samples) < MAX_SAMPLES:
                tally.samples.append((connection.exchange, data[head + 4 :]))
        else:
            tally.fault = tally.fault or data[:1000].decode(errors="replace")
            if status in (b"429", b"503"):
                tally.refusals.append(latency)
                tally.without_retry_after += b"\r\nretry-after:" not in data[:head].lower()
        # The server closes after "Connection: close"; one that answers before it has read all
        # of a request leaves the connection in no state to go on with.
        if data.find(b"onnection: close", 0, head) >= 0 or connection.outgoing is not None:
            self._drop(connection)
            connection = self._open()
        self._free.append(connection)

    def _lose(self, connection: Connection, error: OSError | None = None) -> None:
        """It is closed. A request that was on its way is lost, unless nothing ever listened."""
        self._drop(connection)
        if isinstance(error, ConnectionRefusedError):
            self.tally.refused_connections += 1
            self.tally.sent -= 1
            return
        if connection.is_busy:
            self.tally.lost += 1
        else:
            self._free.remove(connection)
        # A closed loop goes on with as many connections as were asked for.
        if self.plan.rate is None and perf_counter() < self._end:
            self._free.append(self._open())

    def _result(self, busy: float) -> Result:
        tally, plan = self.tally, self.plan
        faults = [
            fault
            for number, content in tally.samples
            if (fault := plan.exchanges[number].fault(content, plan.tolerance))
        ]
        latencies, refusals = sorted(tally.latencies), sorted(tally.refusals)
        return Result(
            seconds=plan.seconds,
            sent=tally.sent,
            per_s=tally.in_time / plan.seconds,
            turns_per_s=[count / plan.seconds * plan.turns for count in tally.turns],
            p50_ms=percentile_ms(latencies, 0.5),
            p95_ms=percentile_ms(latencies, 0.95),
            p99_ms=percentile_ms(latencies, 0.99),
            max_ms=percentile_ms(latencies, 1),
            usual_p99_ms=median(tally.turns_p99_ms) if tally.turns_p99_ms else None,
            statuses={status.decode(): count for status, count in tally.statuses.items()},
            lost=tally.lost,
            unsent=max(0, tally.due - tally.sent - tally.refused_connections),
            refused_connections=tally.refused_connections,
            checked=len(tally.samples),
            wrong=len(faults),
            fault=next(iter(faults), tally.fault),
            refusals_p50_ms=percentile_ms(refusals, 0.5),
            refusals_p99_ms=percentile_ms(refusals, 0.99),
            refusals_without_retry_after=tally.without_retry_after,
            busy=round(busy, 3),
        )


def percentile_ms(ordered_s: Sequence[float], share: float) -> float | None:
    """The smallest of `ordered_s` that is not less than `share` of them, in ms."""
    if not ordered_s:
        return None
    index = min(len(ordered_s) - 1, int(share * len(ordered_s)))
    return round(ordered_s[index] * 1000, 4)


def carry_out(plans: Sequence[Plan]) -> list[Result]:
    """By turns, each time beginning with another."""
    gc.disable()
    cpu_started, started = process_time(), perf_counter()
    loads = [Load(plan) for plan in plans]
    for load in loads:
        load.begin()
    for turn in range(plans[0].turns):
        first = turn % len(loads)
        for load in loads[first:] + loads[:first]:
            load.take_turn()
    busy = (process_time() - cpu_started) / (perf_counter() - started)
    return [load.end(busy) for load in loads]


class LoadProcess:
    """A load that runs beside whoever started it: of one server, or of several by turns, whose
    plans have the same number of them and the same CPUs."""

    def __init__(self, *plans: Plan) -> None:
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin  # noqa: S101
        json.dump([plan.to_dict() for plan in plans], self._process.stdin)
        self._process.stdin.close()
        self._process.stdin = None

    def results(self) -> list[Result]:
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError("the load generator failed; its message is above")
        results: list[dict[str, Any]] = json.loads(output)
        return [Result(**fields) for fields in results]

    def result(self) -> Result:
        [result] = self.results()
        return result

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(plan: Plan) -> Result:
    [result] = measure_by_turns([plan])
    return result


def measure_by_turns(plans: Sequence[Plan]) -> list[Result]:
    """Of each, in their order."""
    process = LoadProcess(*plans)
    try:
        return process.results()
    except BaseException:
        process.stop()
        raise


def main() -> None:
    plans = [Plan.from_dict(plan) for plan in json.load(sys.stdin)]
    if plans[0].cpus:
        os.sched_setaffinity(0, plans[0].cpus)
    json.dump([asdict(result) for result in carry_out(plans)], sys.stdout)


if __name__ == "__main__":
    main()
