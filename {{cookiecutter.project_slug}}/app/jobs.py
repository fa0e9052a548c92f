"""Runs the coroutines of requests, for less than asyncio's tasks take."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class Job:
    """A coroutine that nobody waits for, and that waits for futures alone.

    A task takes a callback of the event loop to begin and one to end, and notes itself in a
    `WeakSet`, which is Python: 5 us of the 50 of a request. The current task, which
    `asyncio.timeout` and others ask for, is none or somebody else's: let them have their own.
    """

    __slots__ = ("_context", "_coroutine", "_is_cancelled", "_on_end", "_waits_for")

    def __init__(
        self, coroutine: Coroutine[Any, Any, None], on_end: Callable[["Job"], object]
    ) -> None:
        self._coroutine = coroutine
        self._on_end = on_end
        self._context = copy_context()
        self._waits_for: asyncio.Future[Any] | None = None
        self._is_cancelled = False

    def begin(self) -> None:
        """Run it to where it waits for the first time."""
        if self._is_cancelled:
            self._coroutine.close()
            self._on_end(self)
        else:
            self.go_on_now()

    def cancel(self, msg: object = None) -> None:
        """Raise `asyncio.CancelledError` where it waits, or else where it waits next."""
        if not (self._waits_for and self._waits_for.cancel()):
            self._is_cancelled = True

    def go_on_now(self) -> None:
        self._context.run(self._go_on)

    def go_on_later(self, future: asyncio.Future[Any]) -> None:
        """In the turn of the event loop after the one that has the `future` done."""
        future.add_done_callback(self._go_on, context=self._context)

    def _go_on(self, _: object = None) -> None:
        self._waits_for = None
        try:
            if self._is_cancelled:
                # What it waited for was done already, and it has not been told yet.
                self._is_cancelled = False
                future = self._coroutine.throw(asyncio.CancelledError())
            else:
                future = self._coroutine.send(None)
        except (StopIteration, asyncio.CancelledError):
            self._on_end(self)
        except BaseException as error:
            self._on_end(self)
            context = {"message": "a request failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            # The error knows this frame; the frame must not know the error.
            del context
        else:
            self._wait_for(future)

    def _wait_for(self, future: Any) -> None:
        if future is None:
            # A bare `yield`, as of `asyncio.sleep(0)`: to let others go first.
            asyncio.get_running_loop().call_soon(self._go_on, context=self._context)
            return
        # By this asyncio.Future tells an `await` from a `yield`; whoever gets it takes it back.
        future._asyncio_future_blocking = False  # noqa: SLF001
        self._waits_for = future
        if isinstance(future, PromptFuture) and not future.waiter:
            future.waiter = self
        else:
            self.go_on_later(future)
        if self._is_cancelled:
            self._is_cancelled = False
            future.cancel()


class PromptFuture(asyncio.Future[ResultT]):
    """With its result the job that waits for it goes on at once, and not in the loop's next turn.

    For tasks, and for the second who waits, it is a future like any other. So it is with errors and
    when it is cancelled, which may be while somebody goes through all who wait.
    """

    waiter: Job | None = None

    def set_result(self, result: ResultT, /) -> None:
        waiter, self.waiter = self.waiter, None
        super().set_result(result)
        if waiter:
            waiter.go_on_now()

    def set_exception(self, exception: type | BaseException, /) -> None:
        self._tell_later()
        super().set_exception(exception)

    def cancel(self, msg: object = None) -> bool:
        self._tell_later()
        return super().cancel(msg)

    def _tell_later(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter:
            waiter.go_on_later(self)
