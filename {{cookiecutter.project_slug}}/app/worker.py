"""The gunicorn worker: uvicorn, with a stop that loses no request and a start that can fail."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.errors import StartupError
from app.protocol import Protocol

if TYPE_CHECKING:
    # gunicorn's master imports this file, and needs nothing of the models.
    from app.lifecycle import Lifecycle

log = logging.getLogger(__name__)

ACCEPT_S = 0.05
"""How long a stopping worker goes on to accept the connections that are queued."""

DRAIN_S = 1.0
"""How long open connections may still bring requests after a stop was asked for."""

GC_THRESHOLDS = (10_000, 10, 10)
"""Allocations after which the youngest objects are looked through, and how often the older ones.
Python's own is 700, which 32 requests at a time reach with each batch."""

RETRY_S = 5.0
"""How long a worker that cannot take another's place waits before gunicorn may try again."""


class Worker(UvicornWorker):
    CONFIG_KWARGS: ClassVar = {
        "loop": "uvloop",
        "http": Protocol,
        # Nothing here reads the client's address, so nobody has to correct it.
        "proxy_headers": False,
        "ws": "none",
        # app.api.middleware logs requests, with their ids.
        "access_log": False,
        "server_header": False,
    }

    load_count: ClassVar = multiprocessing.Value("i", 0)
    """Shared, as gunicorn imports this class before it forks."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # gunicorn tells of a worker's start and stop already.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.config.timeout_graceful_shutdown = int(self.cfg.graceful_timeout - 3 * DRAIN_S)

    def load_wsgi(self) -> None:
        try:
            super().load_wsgi()
        except StartupError as error:
            log.critical(str(error))
            # This status, and no other, makes gunicorn give up instead of starting over.
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        lifecycle: Lifecycle = self.wsgi.lifecycle
        lifecycle.join(self.cfg.workers, self.load_count)
        heartbeat = asyncio.create_task(self._beat())
        # What is imported stays. To walk it again once the models are loaded would take 40 ms.
        gc.freeze()
        loading = lifecycle.start()
        loading.add_done_callback(lambda _: spare_the_collector())
        if lifecycle.is_replacement:
            await loading
            if lifecycle.has_failed:
                # gunicorn replaces this one at once, and the others serve on.
                await asyncio.sleep(RETRY_S)
                end(1)
        self._install_sigquit_handler()
        server = DrainingServer(self.config, lifecycle)
        # The bare sockets, as uvloop and gunicorn's wrappers would both close their descriptors.
        await server.serve(sockets=[listener.sock for listener in self.sockets])
        heartbeat.cancel()
        if not server.started or lifecycle.has_failed:
            end(Arbiter.WORKER_BOOT_ERROR)
        if lifecycle.is_broken:
            # gunicorn replaces this one by a new process.
            end(1)

    async def _beat(self) -> None:
        # uvicorn does this only while it serves, and loading and draining may take longer than
        # gunicorn waits for a sign of life.
        is_orphan = False
        while True:
            self.notify()
            if not is_orphan and os.getppid() != self.ppid:
                # gunicorn was killed, and nobody else would ever stop this one.
                is_orphan = True
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(1)


def spare_the_collector() -> None:
    """Take what is loaded, and stays, out of garbage collection.

    A full collection walks all of the modules and models, and stops every request for that
    long: 140 ms with scikit-learn, which was the p99 under load (docs/performance.md of the
    template).
    """
    gc.collect()
    gc.freeze()
    # A request that is answered leaves nothing in a cycle, so there is little to find.
    gc.set_threshold(*GC_THRESHOLDS)


def end(status: int) -> None:
    """Not sys.exit, which would wait for the threads of models that still load."""
    logging.shutdown()
    os._exit(status)


class DrainingServer(Server):
    """Ends when a model or its device fails, and lets connections finish before it closes them.

    uvicorn closes idle keep-alive connections at once. A request that is on its way on one of
    them would be lost, so they are kept for `DRAIN_S`, and every answer says `Connection: close`.
    """

    def __init__(self, config: Config, lifecycle: "Lifecycle") -> None:
        super().__init__(config)
        self.lifecycle = lifecycle

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.lifecycle.is_broken

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifecycle.drain()
        await asyncio.sleep(ACCEPT_S)
        for server in self.servers:
            server.close()
        if self.server_state.connections and self.lifecycle.is_ending:
            await asyncio.sleep(DRAIN_S)
        await super().shutdown(sockets)


def refuse_new_connections(listener: socket.socket) -> None:
    """Have the kernel drop requests to connect, and keep the connections that it has queued.

    For when the whole service stops: to close the socket, which all workers share, resets what
    is queued and not accepted yet. Who is dropped tries again in a second, and is refused then.
    Linux only; elsewhere such connections are lost. See socket(7), SO_ATTACH_FILTER.
    """
    if sys.platform != "linux":
        return
    # Classic BPF over the TCP header: pass what has the flag ACK, in the 14th byte.
    instructions = [
        (0x30, 0, 0, 13),  # A = byte 13
        (0x45, 0, 1, 0x10),  # if not A & ACK, skip one
        (0x06, 0, 0, 0xFFFF),  # pass
        (0x06, 0, 0, 0),  # drop
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(instructions), ctypes.addressof(memory))
    so_attach_filter = 26
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, so_attach_filter, program)
