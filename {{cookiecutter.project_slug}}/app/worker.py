"""The gunicorn worker: uvicorn, with a stop that loses no request and a start that can fail."""

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import socket
import struct
import sys
from typing import ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.errors import StartupError
from app.lifecycle import Lifecycle, Phase

log = logging.getLogger(__name__)

SO_ATTACH_FILTER = 26

ACCEPT_S = 0.05
"""How long queued connections are accepted once no new ones come."""

DRAIN_S = 1.0
"""How long open connections may still bring requests after a stop was asked for."""


class Worker(UvicornWorker):
    CONFIG_KWARGS: ClassVar = {
        "loop": "uvloop",
        "http": "httptools",
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
        lifecycle: Lifecycle = self.wsgi.state.lifecycle
        lifecycle.join(self.cfg.workers, self.load_count)
        self._install_sigquit_handler()
        server = DrainingServer(self.config, lifecycle)
        heartbeat = asyncio.create_task(self._beat_until_started(server))
        # The bare sockets, as uvloop and gunicorn's wrappers would both close their descriptors.
        await server.serve(sockets=[listener.sock for listener in self.sockets])
        heartbeat.cancel()
        if not server.started or lifecycle.phase is Phase.FAILED:
            logging.shutdown()
            # Not sys.exit, which would wait for the threads of models that still load. A
            # replacement that fails does not take down the workers that serve.
            os._exit(1 if lifecycle.is_replacement else Arbiter.WORKER_BOOT_ERROR)

    async def _beat_until_started(self, server: Server) -> None:
        # uvicorn tells gunicorn that the worker lives only once it serves.
        while not server.started:
            self.notify()
            await asyncio.sleep(1)


def refuse_new_connections(listener: socket.socket) -> None:
    """Have the kernel drop what comes for `listener`, and keep what it has queued for us.

    A close alone would reset connections that are established and not accepted yet. A classic
    BPF program of the one instruction "return 0" drops every packet for the listening socket;
    clients try again in a second, and are refused then. See socket(7), SO_ATTACH_FILTER.
    """
    if sys.platform != "linux":
        return
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(drop))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


class DrainingServer(Server):
    """Ends when loading fails; and before it closes connections, lets them finish.

    uvicorn closes idle keep-alive connections at once. A request that is on its way on one of
    them would be lost, so they are kept for `DRAIN_S`, and every answer says `Connection: close`.
    """

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.lifecycle.phase is Phase.FAILED

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifecycle.drain()
        for listener in sockets or []:
            refuse_new_connections(listener)
        await asyncio.sleep(ACCEPT_S)
        for server in self.servers:
            server.close()
        if self.server_state.connections and self.lifecycle.phase is Phase.DRAINING:
            await asyncio.sleep(DRAIN_S)
        await super().shutdown(sockets)
