"""Taking requests in: together, for a while, and each in its turn."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

import pytest

from app.intake import HASTE_S, LONGEST_S, SLICE_S, TOGETHER, Intake
from app.jobs import Job


def job(work: Callable[[], object]) -> Job:
    async def run() -> None:
        work()

    return Job(run(), lambda _: None)


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


@in_a_loop
async def test_jobs_of_a_turn_begin_in_the_next() -> None:
    begun: list[int] = []

    def second() -> None:
        begun.append(2)
        intake.put(job(lambda: begun.append(3)), loop)

    intake, loop = Intake(), asyncio.get_running_loop()
    intake.put(job(lambda: begun.append(1)), loop)
    intake.put(job(second), loop)
    assert not begun
    await asyncio.sleep(0)
    assert begun == [1, 2]
    await asyncio.sleep(0)
    assert begun == [1, 2, 3]


@in_a_loop
async def test_many_begin_in_the_turn_in_which_they_come() -> None:
    begun: list[int] = []
    intake, loop = Intake(), asyncio.get_running_loop()
    for number in range(TOGETHER):
        intake.put(job(lambda number=number: begun.append(number)), loop)  # type: ignore[misc]
    assert not begun
    # The body of the last one may not have been read yet.
    intake.put(job(lambda: begun.append(TOGETHER)), loop)
    assert begun == list(range(TOGETHER))
    await asyncio.sleep(0)
    assert begun == list(range(TOGETHER + 1))


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("app.intake.monotonic", lambda: clock.now)
    return clock


class Connection:
    """Brings a request that takes a quarter of a slice."""

    def __init__(self, number: int, intake: Intake, clock: Clock, taken: list[int]) -> None:
        self.number, self.intake, self.clock, self.taken = number, intake, clock, taken

    def bring(self) -> None:
        """As app.protocol does what a connection brings."""
        loop = asyncio.get_running_loop()
        if self.intake.has_time(self.clock.now, loop):
            self.take_in()
        else:
            self.intake.leave(self.take_in)

    def take_in(self) -> None:
        # A little more, whatever is rounded.
        self.clock.now += SLICE_S / 3.99
        self.intake.put(job(lambda: self.taken.append(self.number)), asyncio.get_running_loop())


def knock(listening: socket.socket) -> socket.socket:
    return socket.create_connection(listening.getsockname(), timeout=30)


def test_when_somebody_knocks_the_rest_waits_for_later_turns_in_its_order(clock: Clock) -> None:
    async def test() -> None:
        intake, taken = Intake(), list[int]()
        with closing(socket.create_server(("127.0.0.1", 0))) as listening, knock(listening):
            intake.watch([listening])
            for number in range(10):
                Connection(number, intake, clock, taken).bring()
            assert not taken
            await asyncio.sleep(0)
            assert taken == list(range(8))
            # There would be time, but others were before.
            Connection(10, intake, clock, taken).bring()
            assert len(taken) == 8
            await asyncio.sleep(0)
            assert taken == list(range(11))
            await asyncio.sleep(0)
            Connection(11, intake, clock, taken).bring()
            await asyncio.sleep(0)
            assert taken == list(range(12))

    asyncio.run(test())


def test_until_somebody_knocks_a_turn_is_long(clock: Clock) -> None:
    async def test() -> None:
        intake, taken = Intake(), list[int]()
        with closing(socket.create_server(("127.0.0.1", 0))) as listening:
            intake.watch([listening])
            for number in range(20):
                Connection(number, intake, clock, taken).bring()
            with knock(listening):
                for number in range(20, 40):
                    Connection(number, intake, clock, taken).bring()
                listening.accept()[0].close()
            # It is accepted, and has to be answered.
            await asyncio.sleep(0)
            assert taken == list(range(len(taken)))
            assert 20 < len(taken) <= 28
            clock.now += HASTE_S
            # There is time again, but others were before.
            Connection(40, intake, clock, taken).bring()
            await asyncio.sleep(0)
            assert taken == list(range(41))

    asyncio.run(test())


def test_it_is_seen_who_knocks_once_in_a_slice(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Door:
        looks = 0

        def poll(self, _: int) -> list[tuple[int, int]]:
            self.looks += 1
            return []

    async def test() -> None:
        intake, door = Intake(), Door()
        monkeypatch.setattr(intake, "_door", door)
        for number in range(41):
            Connection(number, intake, clock, []).bring()
        assert door.looks == 10

    asyncio.run(test())


def test_no_turn_is_longer_than_that(clock: Clock) -> None:
    async def test() -> None:
        intake, taken = Intake(), list[int]()
        with closing(socket.create_server(("127.0.0.1", 0))) as listening:
            intake.watch([listening])
            for number in range(180):
                Connection(number, intake, clock, taken).bring()
            assert LONGEST_S <= clock.now < LONGEST_S + SLICE_S
            await asyncio.sleep(0)
            assert LONGEST_S / SLICE_S * 4 < len(taken) < 180
            assert clock.now < 2 * (LONGEST_S + SLICE_S)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert taken == list(range(180))

    asyncio.run(test())


def test_one_that_fails_does_not_hold_up_the_others(clock: Clock) -> None:
    def fail() -> None:
        raise ValueError

    async def test() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        intake, taken = Intake(), list[int]()
        first, second = (Connection(number, intake, clock, taken) for number in (1, 2))
        first.bring()
        intake.leave(fail)
        second.bring()
        intake.leave(fail)
        await asyncio.sleep(0)
        assert taken == [1]
        await asyncio.sleep(0)
        assert taken == [1, 2]
        assert [type(context["exception"]) for context in told] == [ValueError, ValueError]

    asyncio.run(test())


def test_sockets_that_are_closed_do_not_knock(clock: Clock) -> None:
    async def test() -> None:
        intake, taken = Intake(), list[int]()
        with closing(socket.create_server(("127.0.0.1", 0))) as listening, knock(listening):
            intake.watch([listening])
            intake.watch_no_more()
        for number in range(20):
            Connection(number, intake, clock, taken).bring()
        await asyncio.sleep(0)
        assert taken == list(range(20))

    asyncio.run(test())
