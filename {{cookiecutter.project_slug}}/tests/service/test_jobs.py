"""Coroutines without tasks: they wait for futures, can be cancelled, and always end once."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

from app.jobs import Job, PromptFuture

name: ContextVar[str] = ContextVar("name")


class Followed:
    """A job, and what became of it."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.ended = 0
        self.job = Job(coroutine, self._end)

    def _end(self, job: Job) -> None:
        assert job is self.job
        self.ended += 1


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


@in_a_loop
async def test_gets_what_it_waits_for() -> None:
    first, second = asyncio.Future[int](), asyncio.Future[int]()
    got: list[object] = []

    async def work() -> None:
        got.append(await first)
        try:
            await second
        except ValueError as error:
            got.append(error)

    followed = Followed(work())
    followed.job.begin()
    first.set_result(1)
    await turns()
    assert got == [1]
    assert followed.ended == 0
    error = ValueError()
    second.set_exception(error)
    await turns()
    assert got == [1, error]
    assert followed.ended == 1


@in_a_loop
async def test_goes_on_within_the_result_of_a_prompt_future_in_its_own_context() -> None:
    future = PromptFuture[int]()
    got: list[tuple[int, str]] = []

    async def work() -> None:
        name.set("work")
        got.append((await future, name.get()))

    followed = Followed(work())
    followed.job.begin()
    future.set_result(1)
    assert got == [(1, "work")]
    assert followed.ended == 1
    assert name.get("none") == "none"
    await turns()
    assert followed.ended == 1


@in_a_loop
async def test_does_not_go_on_within_an_error_of_a_prompt_future() -> None:
    future = PromptFuture[int]()
    got: list[ValueError] = []

    async def work() -> None:
        try:
            await future
        except ValueError as error:
            got.append(error)

    followed = Followed(work())
    followed.job.begin()
    error = ValueError()
    future.set_exception(error)
    assert not got
    await turns()
    assert got == [error]
    assert followed.ended == 1


@in_a_loop
async def test_does_not_go_on_within_the_end_of_a_prompt_future() -> None:
    future = PromptFuture[None]()
    followed = Followed(future_of(future))
    followed.job.begin()
    followed.job.cancel()
    assert future.cancelled()
    assert followed.ended == 0
    await turns()
    assert followed.ended == 1


@in_a_loop
async def test_a_second_one_may_wait_for_a_prompt_future() -> None:
    future = PromptFuture[None]()
    both = [Followed(future_of(future)) for _ in range(2)]
    for followed in both:
        followed.job.begin()
    future.set_result(None)
    await turns()
    assert [followed.ended for followed in both] == [1, 1]


@in_a_loop
async def test_a_task_may_wait_for_a_prompt_future() -> None:
    future = PromptFuture[int]()
    waiting = asyncio.create_task(asyncio.wait_for(future, 60))
    await turns()
    future.set_result(1)
    assert await waiting == 1


@in_a_loop
async def test_that_waits_for_nothing_ends_at_once() -> None:
    async def work() -> None:
        pass

    followed = Followed(work())
    followed.job.begin()
    assert followed.ended == 1


@in_a_loop
async def test_may_wait_for_a_task() -> None:
    got: list[int] = []

    async def work() -> None:
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        got.append(1)

    async def have_it_done() -> None:
        await asyncio.create_task(work())

    followed = Followed(have_it_done())
    followed.job.begin()
    await turns(5)
    assert got == [1]
    assert followed.ended == 1


@in_a_loop
async def test_cancelled_while_it_waits() -> None:
    future = asyncio.Future[None]()
    followed = Followed(future_of(future))
    followed.job.begin()
    followed.job.cancel()
    await turns()
    assert future.cancelled()
    assert followed.ended == 1


@in_a_loop
async def test_cancelled_when_what_it_waits_for_is_there_it_never_hears_of_that() -> None:
    first, second = asyncio.Future[None](), asyncio.Future[None]()
    got: list[str] = []

    async def work() -> None:
        try:
            await first
            got.append("first")
        except asyncio.CancelledError:
            got.append("cancelled")
            await second
            got.append("second")

    followed = Followed(work())
    followed.job.begin()
    first.set_result(None)
    followed.job.cancel()
    followed.job.cancel()
    await turns()
    assert got == ["cancelled"]
    second.set_result(None)
    await turns()
    assert got == ["cancelled", "second"]
    assert followed.ended == 1


@in_a_loop
async def test_may_let_others_go_first() -> None:
    got: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0)
        got.append("job")

    followed = Followed(work())
    followed.job.begin()
    got.append("others")
    await turns()
    assert got == ["others", "job"]
    assert followed.ended == 1


@in_a_loop
async def test_may_go_on_after_it_was_cancelled() -> None:
    future, later = asyncio.Future[None](), asyncio.Future[str]()
    got: list[str] = []

    async def work() -> None:
        try:
            await future
        except asyncio.CancelledError:
            got.append(await later)

    followed = Followed(work())
    followed.job.begin()
    followed.job.cancel()
    await turns()
    later.set_result("more")
    await turns()
    assert got == ["more"]
    assert followed.ended == 1


@in_a_loop
async def test_cancelled_before_it_begins() -> None:
    begun: list[int] = []

    async def work() -> None:
        begun.append(1)

    followed = Followed(work())
    followed.job.cancel()
    followed.job.begin()
    assert not begun
    assert followed.ended == 1


@in_a_loop
async def test_cancelled_by_itself_it_ends_where_it_waits_next() -> None:
    future = asyncio.Future[None]()

    async def work() -> None:
        followed.job.cancel()
        await future

    followed = Followed(work())
    followed.job.begin()
    await turns()
    assert future.cancelled()
    assert followed.ended == 1


@in_a_loop
async def test_an_error_that_nothing_caught_is_told() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    error = KeyError("x")

    async def work() -> None:
        raise error

    followed = Followed(work())
    followed.job.begin()
    assert followed.ended == 1
    assert [context["exception"] for context in told] == [error]


@in_a_loop
async def test_each_has_a_context_of_its_own() -> None:
    futures = {text: asyncio.Future[None]() for text in ("one", "two")}
    seen: list[tuple[str, str]] = []

    async def work(text: str) -> None:
        name.set(text)
        await futures[text]
        seen.append((text, name.get()))

    for text in futures:
        Followed(work(text)).job.begin()
    assert name.get("none") == "none"
    for future in futures.values():
        future.set_result(None)
    await turns()
    assert seen == [("one", "one"), ("two", "two")]


async def future_of(future: asyncio.Future[None]) -> None:
    await future
