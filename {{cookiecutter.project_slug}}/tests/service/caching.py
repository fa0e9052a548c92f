"""A cache with a model that is asked, for the tests of both."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx

from app.cache import Answered, ResponseCache, Stores, Times
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics
from app.predictor import BaseFeatures, BasePrediction, ItemError
from app.tickets import Outlet, Ticket
from tests.service.server import Service
from tests.service.test_batches import sample

FAR = 1e9


class Features(BaseFeatures):
    x: float
    name: str = ""


class Other(Features):
    count: int = 0


class Answer(BasePrediction):
    y: float


class Asked:
    """The ticket of rows that the model was asked for."""

    def __init__(self, outlet: Outlet[BasePrediction | ItemError]) -> None:
        self.outlet = outlet
        self.was_in_vain = False
        self.deadline = 0.0

    def prolong(self, deadline: float) -> None:
        self.deadline = max(deadline, self.deadline)

    def withdraw(self) -> None:
        self.was_in_vain = not self.outlet.done()
        self.outlet.cancel()


class Model:
    """Is asked, and answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []
        self.tickets: list[Asked] = []

    def submit(
        self, rows: Sequence[BaseFeatures], outlet: Outlet[BasePrediction | ItemError]
    ) -> Ticket[BasePrediction | ItemError]:
        self.asked.append([row.x for row in rows])  # type: ignore[attr-defined]
        self.tickets.append(Asked(outlet))
        return self.tickets[-1]

    def say(self, run: int = -1, *outcomes: BasePrediction | ItemError) -> None:
        twice = [Answer(y=2 * x) for x in self.asked[run]]
        assert not self.tickets[run].outlet.done(), "nobody waits"
        self.tickets[run].outlet.set_result(outcomes or twice)


def cache(**changes: Any) -> ResponseCache:
    given: dict[str, Any] = {
        "identity": ["model", "1"],
        "types": (Features, Answer),
        "times": Times(60),
    }
    given |= {"stores": Stores(MemoryStore(1_000_000)), "metrics": CacheMetrics("tested", "1")}
    return ResponseCache(**(given | changes))


def served(cached: ResponseCache, asked: Model, **more: Any) -> Any:
    """What `inference` and a route need of a served model; `asked` answers in the next turn."""

    def submit(rows: Any, _: float, outlet: Any, **__: Any) -> Any:
        ticket: Any = asked.submit(rows, outlet)
        ticket.timings = None
        asyncio.get_running_loop().call_soon(asked.say, len(asked.asked) - 1)
        return ticket

    outlet = asyncio.get_running_loop().create_future
    its: dict[str, Any] = {"values": None, "metrics": None, "admit": lambda *_: None}
    its["is_trivial"] = True
    its |= {"cache": cached, "version": "1", "submit": submit, "outlet": outlet}
    return SimpleNamespace(**(its | more))


def terms_of(**changed: Any) -> Any:
    terms = {"timings": None, "deadline": FAR, "priority": 0, "body": None, "is_alone": False}
    terms["takes_one_row"] = True
    return SimpleNamespace(**({"use": "normal"} | terms | changed))


def ask(
    cached: ResponseCache, model: Model, *xs: float, deadline: float = FAR, refresh: bool = False
) -> asyncio.Task[Answered]:
    rows = [Features(x=x) for x in xs]
    return asyncio.create_task(cached.answer(rows, model.submit, deadline, refresh=refresh))


def ys(answered: Answered) -> list[float]:
    outcomes, _, _ = answered
    return [outcome.y for outcome in outcomes]  # type: ignore[union-attr]


def age_s(answered: Answered) -> float | None:
    return answered[1]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    # Who waits for nobody would wait for ever.
    asyncio.run(asyncio.wait_for(test(), 30))


def runs(service: Service, version: str = "1") -> float:
    """Rows that the model was run on, beside those of the warm-up."""
    return sample(service, "inference_batch_size_sum", model="double", version=version)


def double(service: Service, x: float, **headers: str) -> httpx.Response:
    return service.client.post("/v1/predict", json={"features": {"x": x}}, headers=headers)
