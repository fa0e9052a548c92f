"""The settings that gunicorn's own process needs, had without importing what reads them.

That process only watches over the workers. With pydantic it would hold half as much again, for as
long as the service runs (docs/performance.md of the template).
"""

import json
import os
import sys
import traceback
from typing import NamedTuple, NoReturn


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
    receiver, sender = os.pipe()
    # A new Python would import what is here already once more.
    reader = os.fork()
    if not reader:
        _send_server_settings(sender)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        sent = pipe.read()
    try:
        exit_code = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
    except ChildProcessError:
        # Where SIGCHLD is ignored there is nothing left to wait for.
        exit_code = 0
    if not sent:
        sys.exit(f"Reading the settings was ended by signal {-exit_code}." if exit_code < 0 else 1)
    return ServerSettings(*json.loads(sent))


def _send_server_settings(sender: int) -> NoReturn:
    try:
        if needed := _load_server_settings():
            os.write(sender, json.dumps(needed).encode())
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # By any other way it would go on as gunicorn.
        os._exit(0)


def _load_server_settings() -> ServerSettings | None:
    """None: some are invalid, which has been said."""
    from app.errors import StartupError
    from app.settings import load_settings

    try:
        settings = load_settings()
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return None
    return ServerSettings(
        settings.bind_address,
        settings.listening_port,
        settings.web_concurrency,
        settings.shutdown_grace_s,
        settings.log_level,
        settings.log_format,
    )
