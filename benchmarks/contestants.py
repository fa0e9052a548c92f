"""What the benchmark knows of a server: how to start it, when it is ready, how to ask it.

Each is a folder in `servers/` with a `contestant.py` that has one `CONTESTANT`.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.workloads import Body

SERVERS = Path(__file__).parent / "servers"

AnswerPath = tuple[str | int, ...]
"""Where in the JSON of an answer the score is, such as ("predictions", 0, "score")."""


@dataclass(frozen=True)
class Place:
    """Where a contestant lives on this machine."""

    home: Path
    """Its own folder below build/bench/."""

    models: Path
    """The workloads' models, as `<model>/model.onnx` or `<model>/model.joblib`."""

    template: Path
    """The template to make our service from."""

    @property
    def python(self) -> Path:
        """The interpreter of its own environment."""
        return self.home / "venv" / "bin" / "python"


@dataclass(frozen=True)
class Command:
    arguments: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A prediction request for one row, and where its answer has the score."""

    path: str
    content_type: str
    content: bytes
    answer_path: AnswerPath


class NotSupportedError(Exception):
    """A contestant cannot take part in a workload; the message says why."""


def _nothing(_: Place) -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """`start` gives the command that serves one model on one port; it raises NotSupportedError
    where the contestant cannot."""

    title: str
    start: Callable[[Place, str, int], Command]
    """From the place, the workload's name (`w1`) and the port."""

    ready_path: str
    """Answers 200 to a GET once predictions can be asked for."""

    request: Callable[[str, Body], Request]
    """From the workload's name and one of its bodies."""

    health_path: str = ""
    """Answers 200 while the process lives; without one, `ready_path` is asked."""

    prepare: Callable[[Place], None] = _nothing
    """What has to be done once, after its environment was made."""


def contestants() -> dict[str, Contestant]:
    """By the name of the folder."""
    names = sorted(path.parent.name for path in SERVERS.glob("*/contestant.py"))
    return {name: load(name) for name in names}


def load(name: str) -> Contestant:
    contestant = importlib.import_module(f"benchmarks.servers.{name}.contestant").CONTESTANT
    if not isinstance(contestant, Contestant):
        raise TypeError(f"servers/{name}/contestant.py: CONTESTANT is no Contestant")
    return contestant


def plain_request(path: str) -> Callable[[str, Body], Request]:
    """A row as the whole body, answered with {"score": ...}."""

    def request(_: str, body: Body) -> Request:
        if isinstance(body, bytes):
            return Request(path, "application/octet-stream", body, ("score",))
        return Request(path, "application/json", json.dumps(body).encode(), ("score",))

    return request


def uvicorn(place: Place, folder: Path, workload: str, port: int) -> Command:
    """`folder`/server.py with `app`, told by MODELS and WORKLOAD what to serve."""
    arguments = ["-m", "uvicorn", "server:app", "--host", "127.0.0.1", "--port", str(port)]
    quick = ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    environment = {"MODELS": str(place.models), "WORKLOAD": workload}
    return Command([str(place.python), *arguments, *quick], folder, environment)
