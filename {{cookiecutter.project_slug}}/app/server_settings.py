"""The settings that gunicorn's own process needs, had without importing what reads them.

That process only watches over the workers. With pydantic it would hold half as much again, for as
long as the service runs (docs/performance.md of the template).
"""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import NamedTuple


class ServerSettings(NamedTuple):
    """As in `app.settings.Settings`; the port is the one that is listened on."""

    bind_address: str
    port: int
    web_concurrency: int
    shutdown_grace_s: int
    log_level: str
    log_format: str


def read_server_settings() -> ServerSettings:
    """Read by another process, which ends before this returns.

    Raises:
        SystemExit: some are invalid; the other process has said which.
    """
    # A fork, as a new Python would import what is here already once more.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    reader = context.Process(target=_send_server_settings, args=(sender,))
    reader.start()
    sender.close()
    with receiver:
        try:
            needed = receiver.recv()
        except EOFError:
            needed = None
    reader.join()
    if needed is None:
        killed_by = -(reader.exitcode or 0)
        sys.exit(f"Reading the settings was ended by signal {killed_by}." if killed_by > 0 else 1)
    return ServerSettings(*needed)


def _send_server_settings(sender: Connection) -> None:
    from app.errors import StartupError
    from app.settings import load_settings

    try:
        settings = load_settings()
    except StartupError as error:
        sys.exit(str(error))
    needed = ServerSettings(
        settings.bind_address,
        settings.listening_port,
        settings.web_concurrency,
        settings.shutdown_grace_s,
        settings.log_level,
        settings.log_format,
    )
    sender.send(tuple(needed))
