"""The gunicorn worker: uvicorn, with a stop that loses no request and a start that can fail."""

import asyncio
import logging
import os
import socket
import sys
from typing import ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.errors import StartupError
from app.lifecycle import Lifecycle, Phase

log = logging.getLogger(__name__)

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
        self._install_sigquit_handler()
        server = DrainingServer(self.config, lifecycle)
        # The bare sockets, as uvloop and gunicorn's wrappers would both close their descriptors.
        await server.serve(sockets=[listener.sock for listener in self.sockets])
        if not server.started or lifecycle.phase is Phase.FAILED:
            logging.shutdown()
            # Not sys.exit, which would wait for the threads of models that still load.
            os._exit(Arbiter.WORKER_BOOT_ERROR)


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
        for server in self.servers:
            server.close()
        if self.server_state.connections and self.lifecycle.phase is Phase.DRAINING:
            await asyncio.sleep(DRAIN_S)
        await super().shutdown(sockets)
