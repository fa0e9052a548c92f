"""Server processes: starting them on their cores, seeing them ready, weighing and stopping them.

Linux only: cores and memory are read from where Linux has them.
"""

import http.client
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import NamedTuple, Self

from benchmarks.contestants import Command

READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 45
POLL_S = 0.01
FIRST_PORT = 21_000
LAST_PORT = 32_000
"""Below the ports that the kernel gives to outgoing connections, which it might hand out first."""


@dataclass(frozen=True)
class Cores:
    """Which CPUs the server and the load have; the same where there is only one."""

    server: list[int]
    load: list[int]

    @property
    def are_apart(self) -> bool:
        return not set(self.server) & set(self.load)


def split_cores() -> Cores:
    cpus = sorted(os.sched_getaffinity(0))
    return Cores(cpus[:1], cpus[1:2] or cpus[:1])


def shared_cores() -> Cores:
    """The first two for the server, and for the load, which has none of its own."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    return Cores(cpus, cpus)


@dataclass(frozen=True)
class Memory:
    """Of a process and all that it has started, in MB of 10^6 bytes."""

    rss_mb: float
    """What is resident in each process, added up: pages that two share count twice."""

    pss_mb: float
    """The same with shared pages divided among those who share them."""


class Server:
    """A running contestant. Its output goes to `log`."""

    def __init__(
        self,
        command: Command,
        ready_path: str,
        port: int,
        log: Path,
        cpus: list[int],
    ) -> None:
        self.port = port
        self.log = log
        self.left_over = 0
        """Processes that were there still after it had ended, and were killed then."""

        log.parent.mkdir(parents=True, exist_ok=True)
        # What the developer has set for their own service must not reach this one.
        own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._started = perf_counter()
        with log.open("wb") as output, running_on(cpus):
            self.process = subprocess.Popen(
                command.arguments,
                cwd=command.folder,
                env=own | command.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for the benchmark, which then stops the server.
                start_new_session=True,
            )
        try:
            self._wait_until_ready(ready_path)
        except BaseException:
            self.stop()
            raise
        self.cold_start_s = perf_counter() - self._started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self, path: str) -> None:
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended:\n{self.last_lines()}")
            if status(self.port, path) == 200:
                return
            if perf_counter() > self._started + READY_TIMEOUT_S:
                raise TimeoutError(f"{path} did not become 200:\n{self.last_lines()}")
            sleep(POLL_S)

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def memory(self) -> Memory:
        rss = pss = 0
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            except OSError:  # It has just ended.
                continue
            sizes_kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
            rss += sizes_kb["Rss"]
            pss += sizes_kb["Pss"]
        return Memory(rss * 1024 / 1e6, pss * 1024 / 1e6)

    def cpu_s(self) -> float:
        """CPU time so far, of all its processes. Unlike throughput, no neighbour disturbs it."""
        ticks = 0
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            except OSError:
                continue
            user, system = stat.rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> float:
        """The seconds that it took to end after SIGTERM."""
        started = perf_counter()
        family = set(descendants(self.process.pid))
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        seconds = perf_counter() - started
        # What it has started since then is in its session.
        for pid, of in _processes().items():
            if pid in family or of.session == self.process.pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.left_over += 1
        return seconds


@contextmanager
def running_on(cpus: list[int]) -> Iterator[None]:
    """This thread is on `cpus`, and so is from its first instruction on what it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def busy_s(cpus: list[int]) -> float:
    """For how long `cpus` have been at work since the system started, or were taken away from it
    by the machine that it runs on."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *times = line.split()
        if name in {f"cpu{cpu}" for cpu in cpus}:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, times[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


class _Relations(NamedTuple):
    parent: int
    session: int


def _processes() -> dict[int, _Relations]:
    """All that run on this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may have anything in it.
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        state, parent, _, session = fields[:4]
        if state != "Z":
            found[int(path.parent.name)] = _Relations(int(parent), int(session))
    return found


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that these have, and so on."""
    processes = _processes()
    found = [pid]
    for parent in found:
        found += [child for child, of in processes.items() if of.parent == parent]
    return found[1:]


def status(port: int, path: str) -> int | None:
    """The status of a GET; None if there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def free_port() -> int:
    for port in range(FIRST_PORT, LAST_PORT):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")
