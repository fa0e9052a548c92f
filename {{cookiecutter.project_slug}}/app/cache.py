"""The response cache: answers that a model gave before, and one run for all who ask the same.

A wrong answer is worse than none. So the key of an answer holds all that it depends on: the
service, the model, its version, files, code and schemas, and every value of the row. Only
predictions are kept, as JSON, and one that does not fit the schema when it is read is a miss.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import NamedTuple, Protocol

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from app.batching import Submission, outcomes_of
from app.canonical import Canonical
from app.deadlines import Deadlines
from app.errors import DeadlineExceeded, PredictionFailed
from app.memory_store import Entry, MemoryStore
from app.metrics import CacheMetrics
from app.predictor import BaseFeatures, BasePrediction, ItemError

KEY_BYTES = 32
"""Nobody finds two rows with the same BLAKE2b of 256 bits, not even on purpose."""

Key = bytes
Outcome = BasePrediction | ItemError
Submit = Callable[[Sequence[BaseFeatures]], Submission[Outcome]]


class Answered(NamedTuple):
    outcomes: Sequence[Outcome]
    """One for each row, in order."""

    age_s: float | None
    """Of the oldest of them; None: the model was asked for some."""


Landing = asyncio.Future[dict[Key, Outcome]]
"""What came out for the rows of a flight. Empty if that is of no use to others."""


@dataclass(eq=False, slots=True)
class _Flight:
    """Rows that the model is asked for, once, for all who want to know."""

    keys: Sequence[Key]
    submission: Submission[Outcome]
    leader: Landing
    """Of the one who asked; the others follow."""

    waiting: set[Landing] = field(default_factory=set)


class _Known(NamedTuple):
    prediction: BasePrediction
    entry: Entry


class SharedStore(Protocol):
    """Where other processes find what this one knows; see app.redis_store.

    Nothing here fails, and only `get` takes time.
    """

    async def get(self, names: Sequence[bytes]) -> Sequence[Entry | None]:
        """What is there under `names`; None is also for what could not be found out."""

    def put(self, name: bytes, entry: Entry, ttl_s: float) -> None:
        """Have `entry` kept for `ttl_s`."""

    def discard(self, name: bytes) -> None:
        """Have it forgotten."""


@dataclass(frozen=True)
class Stores:
    """Where answers are kept; all models share them."""

    memory: MemoryStore
    shared: SharedStore | None = None


class ResponseCache:
    """The cache of one version of one model.

    Args:
        identity: what answers depend on beside the row.
        types: of rows and of answers.
        ttl_s: for how long.
    """

    def __init__(
        self,
        identity: Iterable[str],
        types: tuple[type[BaseFeatures], type[BasePrediction]],
        stores: Stores,
        ttl_s: float,
        metrics: CacheMetrics,
    ) -> None:
        features, prediction = types
        self._canonical = Canonical(features)
        context = hashlib.blake2b("\0".join(identity).encode())
        self._prefix = f"prediction:{metrics.model}:{metrics.version}:".encode()
        self._hash = hashlib.blake2b(key=context.digest(), digest_size=KEY_BYTES)
        self._to_json = prediction.__pydantic_serializer__.to_json
        self._from_json = prediction.__pydantic_validator__.validate_json
        self._memory, self._shared = stores.memory, stores.shared
        self._ttl_s = ttl_s
        self.metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._flights: dict[Key, _Flight] = {}
        self._followers: Deadlines[Landing] = Deadlines(_expire)

    def check(self, row: BaseFeatures, prediction: Outcome | None) -> None:
        """
        Raises:
            TypeError: it is not known when two rows of this kind are equal.
            ValueError: what is read from the JSON of a prediction is something else.
        """
        self.key(row)
        content = self._to_json(prediction, by_alias=True)
        read = self._read(Entry(0, content))
        if read is None or self._to_json(read, by_alias=True) != content:
            raise ValueError("a Prediction cannot be read from its own JSON")

    def key(self, row: BaseFeatures) -> Key:
        """
        Raises:
            TypeError: it is not known when two rows of this kind are equal.
        """
        keyed = self._hash.copy()
        keyed.update(self._canonical(row))
        return keyed.digest()

    async def answer(
        self,
        rows: Sequence[BaseFeatures],
        submit: Submit,
        deadline: float,
        *,
        refresh: bool = False,
    ) -> Answered:
        """What is known of `rows`, and for the others what the model says.

        Args:
            submit: has rows scored by the model; called with those for which nobody asks yet.
            deadline: by `time.monotonic`.
            refresh: ask the model for all of them, and keep what it says.

        Raises:
            ServiceError: the model did not take what it was asked for, or could not score it.
        """
        try:
            keys = [self.key(row) for row in rows]
        except TypeError:
            # The example had nothing of the kind: an optional field, say.
            return Answered(await outcomes_of(submit(rows)), None)
        row_of = dict(zip(keys, rows, strict=True))
        known: dict[Key, _Known] = {}
        if not refresh:
            self._recall(row_of, known)
            if self._shared and len(known) < len(row_of):
                await self._recall_shared(self._shared, row_of, known)
            self.metrics.misses.inc(len(row_of) - len(known))
        outcomes: dict[Key, Outcome] = {key: prediction for key, (prediction, _) in known.items()}
        missing = [key for key in row_of if key not in outcomes]
        age_s = None if missing else _age_s(known.values())
        while missing:
            asked = {key: row_of[key] for key in missing}
            outcomes |= await self._ask(asked, submit, deadline, join=not refresh)
            missing = [key for key in missing if key not in outcomes]
        return Answered([outcomes[key] for key in keys], age_s)

    def _recall(self, keys: Iterable[Key], known: dict[Key, _Known]) -> None:
        """Add to `known` what is in memory."""
        before = len(known)
        for key in keys:
            entry = None if key in known else self._memory.get(key)
            if entry is None:
                continue
            if prediction := self._read(entry):
                known[key] = _Known(prediction, entry)
            else:
                self._memory.discard(key)
        self.metrics.hits("memory").inc(len(known) - before)

    async def _recall_shared(
        self, shared: SharedStore, keys: Iterable[Key], known: dict[Key, _Known]
    ) -> None:
        missing = [key for key in keys if key not in known]
        names = [self._name(key) for key in missing]
        entries = await shared.get(names)
        # The model may have said it meanwhile.
        self._recall(missing, known)
        now = time()
        hits = 0
        for key, name, entry in zip(missing, names, entries, strict=True):
            if entry is None or key in known:
                continue
            left_s = self._ttl_s - (now - entry.stored)
            prediction = self._read(entry)
            if prediction is None:
                shared.discard(name)
            elif left_s > 0:
                known[key] = _Known(prediction, entry)
                self._memory.put(key, entry, min(left_s, self._ttl_s))
                hits += 1
        self.metrics.hits("redis").inc(hits)

    def _name(self, key: Key) -> bytes:
        return self._prefix + key.hex().encode()

    def _read(self, entry: Entry) -> BasePrediction | None:
        try:
            prediction: BasePrediction = self._from_json(entry.content)
        except ValidationError:
            self.metrics.invalid.inc()
            return None
        return prediction

    def _keep(self, outcomes: Mapping[Key, Outcome]) -> None:
        now = time()
        for key, outcome in outcomes.items():
            if isinstance(outcome, ItemError):
                continue
            try:
                content = self._to_json(outcome, by_alias=True)
            except PydanticSerializationError:
                continue
            entry = Entry(now, content)
            self._memory.put(key, entry, self._ttl_s)
            if self._shared:
                self._shared.put(self._name(key), entry, self._ttl_s)
        self.metrics.bytes_held.set(self._memory.bytes_held)

    async def _ask(
        self,
        row_of: Mapping[Key, BaseFeatures],
        submit: Submit,
        deadline: float,
        *,
        join: bool,
    ) -> dict[Key, Outcome]:
        """Outcomes of `row_of`: all but those that another caller asked for in vain."""
        joined = {self._flights[key] for key in row_of if key in self._flights} if join else set()
        known = {key for flight in joined for key in flight.keys}
        waited_for: list[tuple[_Flight, Landing]] = []
        if to_lead := {key: row for key, row in row_of.items() if key not in known}:
            flight = self._take_off(to_lead, submit)
            waited_for.append((flight, flight.leader))
        for flight in joined:
            self.metrics.followers.inc()
            landing: Landing = self._loop.create_future()
            flight.waiting.add(landing)
            self._followers.add(landing, deadline)
            waited_for.append((flight, landing))
        outcomes: dict[Key, Outcome] = {}
        try:
            for _, landing in waited_for:
                outcomes |= await landing
        finally:
            for flight, landing in waited_for:
                self._leave(flight, landing)
            # An error knows this frame by its traceback; the frame must not know the error.
            del waited_for, flight, landing
        return outcomes

    def _take_off(self, row_of: Mapping[Key, BaseFeatures], submit: Submit) -> _Flight:
        submission = submit(list(row_of.values()))
        leader: Landing = self._loop.create_future()
        flight = _Flight(list(row_of), submission, leader, {leader})
        if submission.future.done():
            self._land(flight, submission.future)
        else:
            for key in flight.keys:
                self._flights[key] = flight
            submission.future.add_done_callback(partial(self._land, flight))
        return flight

    def _land(self, flight: _Flight, future: asyncio.Future[Sequence[Outcome]]) -> None:
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]
        flight.submission.withdraw()
        # Nobody was left, or so it seemed: who has joined since asks again.
        error = None if future.cancelled() else future.exception()
        outcomes: dict[Key, Outcome] = {}
        if not error and not future.cancelled():
            outcomes = dict(zip(flight.keys, future.result(), strict=True))
            self._keep(outcomes)
        for landing in flight.waiting:
            if landing.done():
                continue
            if error and landing is flight.leader:
                landing.set_exception(error)
            elif isinstance(error, PredictionFailed):
                # Of the same row they would see the same.
                landing.set_exception(PredictionFailed(error.detail))
            else:
                # That the leader was too late, say, is not true of everybody.
                landing.set_result(outcomes)

    def _leave(self, flight: _Flight, landing: Landing) -> None:
        """Who waited has its answer, or gives up."""
        self._followers.discard(landing)
        flight.waiting.discard(landing)
        if not flight.waiting and not flight.submission.future.done():
            flight.submission.withdraw()
        if not landing.cancel() and not landing.cancelled():
            # Another error may have come first; nobody has to hear of both.
            landing.exception()


def _age_s(known: Iterable[_Known]) -> float:
    # The clocks of two machines may differ.
    return max(0.0, time() - min(entry.stored for _, entry in known))


def _expire(landing: Landing) -> None:
    if not landing.done():
        landing.set_exception(DeadlineExceeded("The model did not answer in time."))
