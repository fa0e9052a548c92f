"""How gunicorn runs the service; `python -m app` starts it."""

import itertools
import os
import resource
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.cpus import tell_of_quota
from app.logs import logging_config
from app.server_settings import read_server_settings

# This file is read by gunicorn's own process, which is kept small: what workers import is not
# to be imported here.
settings = read_server_settings()

wsgi_app = "app.main:create_app()"
worker_class = "app.worker.Worker"
host = f"[{settings.bind_address}]" if ":" in settings.bind_address else settings.bind_address
bind = f"{host}:{settings.port}"
workers = settings.web_concurrency
logconfig_dict = logging_config(settings)

# Models are loaded in each worker: a CUDA context and threads do not survive a fork.
preload_app = False

tell_of_quota(os.environ)

# Each connection is an open file, and most shells allow 1,024 where the system allows many more.
_, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
# macOS allows any number, and takes 10,240 at the most.
for files in (most_files, 10_240):
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most_files))
        break

# Longer than the idle time-out of the usual proxies, so that they close first, not we.
keepalive = 75
graceful_timeout = settings.shutdown_grace_s

# A worker whose event loop is stuck for this long is killed. Loading and predicting do not
# count: they run on other threads, unless they take a few milliseconds at most.
timeout = 60

# Neither is needed, and both write to disks that may be read-only.
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None


CHECK = "from app.main import create_app; create_app()"
"""Whether there could be a worker, with the settings and the predictor files as they are now."""


def on_starting(server: Any) -> None:
    """Let a stop of the whole service refuse connections before it closes the socket, and a reload
    that would end the service change nothing."""
    from app.worker import refuse_new_connections

    # SIGUSR2 starts another gunicorn so; by itself it would say `gunicorn`, as sys.argv does.
    server.START_CTX |= {0: sys.executable, "args": [sys.executable, "-m", "app"]}
    stop = server.stop

    def refuse_and_stop(graceful: bool = True) -> None:
        # After SIGUSR2 another gunicorn goes on with the same sockets.
        if server.reexec_pid == server.master_pid == 0:
            for listener in server.LISTENERS:
                refuse_new_connections(listener.sock)
        stop(graceful)

    server.stop = refuse_and_stop
    reload = server.reload

    def check_and_reload() -> None:
        import subprocess

        # What is checked counts nothing.
        environment = {**os.environ}
        environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
        command = [sys.executable, "-c", CHECK]
        checked = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if checked.returncode:
            why = checked.stderr.strip().rpartition("\n")[2]
            server.log.error("Not reloaded, all goes on as it was. %s", why)
        else:
            reload()

    server.reload = check_and_reload


# With several workers, each counts into files of its own, and /metrics adds them up. A worker goes
# on with the files of one that has gone, so they do not pile up and no counter goes backwards.
if workers > 1:
    # A reload goes on with the directory; another gunicorn (SIGUSR2) begins with one of its own.
    if os.environ.get("METRICS_OWNER") != str(os.getpid()):
        os.environ["METRICS_OWNER"] = str(os.getpid())
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")

    def pre_fork(server: Any, worker: Any) -> None:
        taken = {getattr(other, "place", None) for other in server.WORKERS.values()}
        worker.place = next(place for place in itertools.count() if place not in taken)

    def post_fork(server: Any, worker: Any) -> None:
        os.environ["WORKER_PLACE"] = str(worker.place)

    def child_exit(server: Any, worker: Any) -> None:
        # Imported here: it looks for the directory above when it is first imported.
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(worker.place)

    def on_exit(server: Any) -> None:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
