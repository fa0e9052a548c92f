"""The gunicorn worker. gunicorn's own process imports this file, and no more than it needs.

What the service is made of is imported after the fork, in `app.serving`.
"""

import contextlib
import gc
import logging
import mmap
import signal
import socket
import struct
import sys
from typing import ClassVar

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker as BaseWorker


class SharedLoadCount:
    """How many workers have loaded their models. All see it, as it is made before the fork."""

    def __init__(self) -> None:
        # A byte for each worker, so that none has to wait for another to write it.
        self._has_loaded = mmap.mmap(-1, mmap.PAGESIZE)

    def add(self, number: int) -> None:
        """The worker with this number has. Of thousands that were replaced some count as one."""
        self._has_loaded[number % mmap.PAGESIZE] = 1

    @property
    def value(self) -> int:
        return self._has_loaded[:].count(1)


class Worker(BaseWorker):
    load_count: ClassVar = SharedLoadCount()

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # In gunicorn's process, before each fork: what that imports it has by now.
        gc.enable()

    def init_signals(self) -> None:
        # Those of gunicorn's process are inherited. uvicorn sets its own.
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # Log files are opened again at this one; it would end the process otherwise.
        signal.signal(signal.SIGUSR1, self.handle_usr1)
        signal.siginterrupt(signal.SIGUSR1, False)

    def load_wsgi(self) -> None:
        # Until the models are loaded: app.serving.
        gc.disable()
        logging.captureWarnings(True)
        from app.errors import StartupError

        try:
            super().load_wsgi()
        except StartupError as error:
            self.log.critical(str(error))
            # This status, and no other, makes gunicorn give up instead of starting over.
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        # Here, as gunicorn gives up as well after an error before `run`.
        from app.serving import configuration

        self.config = configuration(self)

    def run(self) -> None:
        from app.serving import serve

        serve(self, self.config)


def refuse_new_connections(listener: socket.socket) -> None:
    """Have the kernel drop requests to connect, and keep the connections that it has queued.

    For when the whole service stops: to close the socket, which all workers share, resets what
    is queued and not accepted yet. Who is dropped tries again in a second, and is refused then.
    Linux only; elsewhere such connections are lost. See socket(7), SO_ATTACH_FILTER.
    """
    if sys.platform != "linux":
        return
    # Here, to keep gunicorn's process small until it ends.
    import ctypes

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
