"""Takes one step of load after the other to a service."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Self

from loadtest.client import Client, Tally, new_loop
from loadtest.measure import Step, read_counters, step_of, usage_between
from loadtest.service import LoadTestError, Service

WARM_UP_CONNECTIONS = 16


class Driver:
    """Sends `requests` for `model` to `service`; a context manager.

    Args:
        seconds: that a step takes.
        patience_s: for how long, after the end of a step, answers are waited for.
    """

    def __init__(
        self,
        service: Service,
        model: str,
        requests: Sequence[bytes],
        seconds: float,
        patience_s: float,
    ) -> None:
        self._service = service
        self._model = model
        self._seconds = seconds
        self._client = Client(service.target, requests, patience_s)
        self._runner = asyncio.Runner(loop_factory=new_loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing a connection takes a turn of the loop.
        self._runner.run(self._client.close())
        self._runner.close()

    def warm_up(self) -> None:
        """Let the service learn what batches take, and who comes back.

        Raises:
            LoadTestError: nothing can be measured.
        """
        self._step(0, self._client.closed_loop(WARM_UP_CONNECTIONS, min(1, self._seconds)))

    def closed_loop(self, connections: int) -> Step:
        """
        Raises:
            LoadTestError: nothing can be measured any more.
        """
        return self._step(connections, self._client.closed_loop(connections, self._seconds))

    def open_loop(self, rate: float) -> Step:
        """
        Raises:
            LoadTestError: nothing can be measured any more.
        """
        return self._step(rate, self._client.open_loop(rate, self._seconds))

    def _step(self, asked: float, load: Coroutine[Any, Any, Tally]) -> Step:
        before = read_counters(self._service, self._model)
        try:
            tally = self._runner.run(load)
        except OSError as error:
            self._service.check()
            raise LoadTestError(f"{self._service.url} does not answer: {error}") from error
        self._service.check()
        after = read_counters(self._service, self._model)
        return step_of(asked, tally, usage_between(before, after, tally))
