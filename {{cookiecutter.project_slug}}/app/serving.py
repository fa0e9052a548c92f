"""A worker's uvicorn, with a stop that loses no request and a start that can fail."""

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import warnings
from typing import Any, cast

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server

# Before a line needs it, which may be one that tells of trouble.
from app import structured  # noqa: F401
from app.lifecycle import Lifecycle
from app.protocol import Protocol
from app.worker import Worker

ACCEPTED_TOGETHER = 8
"""How many connections a turn of the event loop accepts. libuv accepts one for each socket that it
listens on (libuv/libuv#3696), so it gets each so many times. With one, of those who connect at once
each had a turn and a batch of its own, and under overload a probe had to wait for as many turns as
had connected before it (docs/performance.md of the template)."""

ACCEPT_S = 0.05
"""How long a stopping worker goes on to accept the connections that are queued."""

DRAIN_S = 1.0
"""How long open connections may still bring requests after a stop was asked for."""

GC_THRESHOLDS = (10_000, 10, 10)
"""Allocations after which the youngest objects are looked through, and how often the older ones.
Python's own is 700, which 32 requests at a time reach with each batch."""

KEPT_BYTES = 64 * 1024 * 1024
"""Memory that may stay free at the end of a heap, of which threads have their own. As much as by
default, once a block of half of it was freed."""

MALLOC_SETTINGS = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}

RETRY_S = 5.0
"""How long a worker that cannot take another's place waits before gunicorn may try again."""


def configuration(worker: Worker) -> Config:
    return Config(
        worker.wsgi,
        # One is what this process is. uvicorn would read WEB_CONCURRENCY, and of an empty one fail.
        workers=1,
        loop="uvloop",
        http=Protocol,
        ws="none",
        log_config=None,
        # app.api.middleware logs requests, with their ids.
        access_log=False,
        # Nothing here reads the client's address, so nobody has to correct it.
        proxy_headers=False,
        server_header=False,
        backlog=worker.cfg.backlog,
        limit_max_requests=worker.max_requests,
        timeout_keep_alive=worker.cfg.keepalive,
        timeout_graceful_shutdown=int(worker.cfg.graceful_timeout - 3 * DRAIN_S),
        ssl_certfile=worker.cfg.certfile,
        ssl_keyfile=worker.cfg.keyfile,
        ssl_ca_certs=worker.cfg.ca_certs,
        ssl_cert_reqs=worker.cfg.cert_reqs,
        ssl_ciphers=worker.cfg.ciphers,
    )


def serve(worker: Worker, config: Config) -> None:
    """Answer requests until the worker is told to stop, or cannot go on."""
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(worker, config))


async def _serve(worker: Worker, config: Config) -> None:
    lifecycle: Lifecycle = worker.wsgi.lifecycle
    lifecycle.join(worker.age, worker.cfg.workers, worker.load_count)
    server = DrainingServer(config, lifecycle)
    # gunicorn's word for a quick stop. The other ends a worker in whatever it does.
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGQUIT, signal.raise_signal, signal.SIGTERM)
    heartbeat = asyncio.create_task(_beat(worker))
    # What is imported stays. To walk it, now or once the models are loaded, would take 40 ms, and
    # find 1 MB.
    gc.freeze()
    loading = lifecycle.start()
    loading.add_done_callback(lambda _: settle_in())
    if lifecycle.is_replacement:
        await loading
        if lifecycle.has_failed:
            # gunicorn replaces this one at once, and the others serve on.
            await asyncio.sleep(RETRY_S)
            end(1)
    # The bare sockets, as uvloop and gunicorn's wrappers would both close their descriptors.
    listening = [listener.sock for listener in worker.sockets]
    Protocol.intake.watch(listening)
    again = [sock.dup() for sock in listening for _ in range(ACCEPTED_TOGETHER - 1)]
    await server.serve(sockets=listening + again)
    heartbeat.cancel()
    if not server.started or lifecycle.has_failed:
        end(Arbiter.WORKER_BOOT_ERROR)
    if lifecycle.is_broken:
        # gunicorn replaces this one by a new process.
        end(1)


async def _beat(worker: Worker) -> None:
    """Give gunicorn signs of life: while models load and requests drain as well."""
    is_orphan = False
    while True:
        worker.notify()
        if not is_orphan and os.getppid() != worker.ppid:
            # gunicorn was killed, and nobody else would ever stop this one.
            is_orphan = True
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(1)


def settle_in() -> None:
    """What is there stays, and what comes are requests, each like the one before."""
    spare_the_collector()
    keep_freed_memory()
    ignore_warnings()


def spare_the_collector() -> None:
    """Take what is loaded, and stays, out of garbage collection, and begin to collect.

    A full collection walks all of the modules and models, and stops every request for that
    long: 140 ms with scikit-learn, which was the p99 under load (docs/performance.md of the
    template).
    """
    gc.collect()
    gc.freeze()
    # A request that is answered leaves nothing in a cycle, so there is little to find.
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()


def keep_freed_memory() -> None:
    """Have glibc keep what one request frees for the next; see mallopt(3).

    With its defaults it can happen that what large bodies and arrays took goes back to the kernel
    each time. Of a service of 48 kB images that was half of its time, after some starts and not
    after others (docs/performance.md of the template).
    """
    libc = ctypes.CDLL(None)
    # Not every C library has it; and who has set it knows better.
    if hasattr(libc, "mallopt") and MALLOC_SETTINGS.isdisjoint(os.environ):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, KEPT_BYTES)
        libc.mallopt(mmap_threshold, KEPT_BYTES // 2)


def ignore_warnings() -> None:
    """Have Python's warnings ignored, but for those that were made errors.

    scikit-learn sets all filters anew for each tree of a forest. With the eleven that come with
    Python, NumPy and SciPy that is two fifths of what a forest takes (docs/performance.md of the
    template). What there is to be warned of, loading and warming up have shown; who sets
    PYTHONWARNINGS gets what it says.
    """
    if sys.warnoptions:
        return
    filters = cast(list[tuple[Any, ...]], warnings.filters)
    last_error = max((at for at, entry in enumerate(filters) if entry[0] == "error"), default=-1)
    # What comes before it says which of its warnings are none.
    kept = filters[: last_error + 1]
    warnings.resetwarnings()
    filters[:] = kept
    warnings.simplefilter("ignore", append=True)


def end(status: int) -> None:
    """Not sys.exit, which would wait for the threads of models that still load."""
    logging.shutdown()
    os._exit(status)


class DrainingServer(Server):
    """Ends when a model or its device fails, and lets connections finish before it closes them.

    uvicorn closes idle keep-alive connections at once. A request that is on its way on one of
    them would be lost, so they are kept for `DRAIN_S`, and every answer says `Connection: close`.
    """

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.lifecycle.is_broken

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifecycle.drain()
        await asyncio.sleep(ACCEPT_S)
        Protocol.intake.watch_no_more()
        for server in self.servers:
            server.close()
        if self.server_state.connections and self.lifecycle.is_ending:
            await asyncio.sleep(DRAIN_S)
        await super().shutdown(sockets)
