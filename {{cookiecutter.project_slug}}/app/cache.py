"""The response cache: answers that a model gave before, and one run for all who ask the same.

A wrong answer is worse than none. So the key of an answer holds all that it depends on: the
service, the model, its version, files, code and schemas, and every value of the row. Where a row
follows from the JSON that it is read from, a body may stand for it (app.known_bodies). Only
predictions are kept, as JSON, and one that does not fit the schema when it is read is a miss.
"""

import asyncio
import hashlib
import struct
from binascii import hexlify
from collections.abc import Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from hmac import compare_digest
from operator import attrgetter
from time import time
from typing import Any, NamedTuple, Protocol

from app.canonical import Canonical
from app.flights import Flights, Key, Run
from app.jobs import PromptFuture
from app.known_bodies import MAX_BODY_BYTES, KnownBodies
from app.memory_store import MemoryStore
from app.metrics import CacheMetrics
from app.passed_by import PassedBy
from app.predictor import BaseFeatures, BasePrediction
from app.runner import Outcome
from app.shared_run import Others, SharedRun, Submit
from app.tickets import Ticket, outcomes_of
from app.token_bucket import TokenBucket

KEY_BYTES = 32
"""Nobody finds two rows with the same BLAKE2b of 256 bits, not even on purpose."""

FORMAT = 2
HEAD = struct.Struct(">Bd16s")
"""A value begins with its format, when the model said it, in seconds since the epoch, and a keyed
digest of its key and all else, so that one that was changed, or has got under another key, is found
out. The rest is the JSON of the prediction."""

UNSEALED = bytes(16)
"""In place of the digest, where nobody else can change it."""

MAX_SKEW_S = 5.0
"""By so much the clock of another machine may be ahead."""

VAIN_LOOKUPS = 1000
VAIN_LOOKUPS_PER_S = 250
"""For so many rows of a version of a model each process may ask the shared store in vain: at once,
and for how many more each second. A lookup takes longer than a small model does: where many ask,
and seldom the same, it would cost a third of what the service can answer (docs/performance.md of
the template)."""

EARNED_BY_HIT = 16
"""How many more lookups one that finds something pays for: where one in sixteen does, there is no
bound."""

PASSED_BY: Key = b""
"""In place of a key, of what the model is asked for as without a cache."""

Keys = tuple[Key, ...]


Answered = tuple[Sequence[Outcome], float | None, bytes | None]
"""One outcome for each row, in order; the age of the oldest in seconds, None: the model was asked
for some; and the JSON of the only prediction, if it was needed here anyway."""


@dataclass(slots=True)
class Recalled:
    content: bytes
    """The JSON of a prediction."""

    age_s: float


@dataclass(slots=True)
class _Known:
    prediction: BasePrediction
    said: float
    """When, in seconds since the epoch."""


class SharedStore(Protocol):
    """Where other processes find what this one knows; see app.redis_store.

    Nothing here fails, and only `get` and `take` take time.
    """

    def get(self, name: bytes, deadline: float) -> asyncio.Future[bytes | None]:
        """What is there under `name`; None is also for what could not be found out in time."""

    def put(self, values: Mapping[bytes, bytes], ttl_s: float) -> None:
        """Have `values` kept under their names for `ttl_s`."""

    def discard(self, name: bytes) -> None:
        """Have it forgotten."""

    async def take(self, names: Sequence[bytes], ttl_s: float, deadline: float) -> Sequence[bool]:
        """Put something under those of `names` where nothing is, for `ttl_s` at most.

        Whether there was nothing; true is also for what could not be found out in time.
        """


class Times(NamedTuple):
    """In seconds."""

    keep: float
    """For how long an answer is given again."""

    lock: float = 0
    """For how long others that share a store wait for one that runs the model; 0: they do not."""


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
    """

    def __init__(
        self,
        identity: Iterable[str],
        types: tuple[type[BaseFeatures], type[BasePrediction]],
        stores: Stores,
        times: Times,
        metrics: CacheMetrics,
    ) -> None:
        features, prediction = types
        canonical = Canonical(features)
        self._canonical = canonical.of
        self._prediction = prediction
        context = hashlib.blake2b("\0".join([str(FORMAT), *identity]).encode())
        self._prefix = f"prediction:{metrics.model}:{metrics.version}:".encode()
        # With a first byte, which each copy would otherwise wait for to take the key in.
        self._hash = hashlib.blake2b(b"\0", key=context.digest(), digest_size=KEY_BYTES)
        self._seals = hashlib.blake2b(b"\0", key=context.digest(), digest_size=len(UNSEALED))
        self._to_json = prediction.__pydantic_serializer__.to_json
        self._from_json = prediction.__pydantic_validator__.validate_json
        self._memory, self._shared = stores.memory, stores.shared
        self._ttl_s = times.keep
        self._lock_s = times.lock if stores.shared else 0
        self._lookups = TokenBucket(VAIN_LOOKUPS_PER_S, VAIN_LOOKUPS)
        """In the shared store, that may still be in vain."""

        self.metrics = metrics
        self.bodies = KnownBodies() if canonical.follows_from_json else None
        """None: it takes more than a body to know what row it holds."""

        self._passed_by = PassedBy(
            follows_from_json=canonical.follows_from_json, count=metrics.passed_by
        )
        self._loop = asyncio.get_running_loop()
        self._flights = Flights(self._keep_run)
        self._ended: list[tuple[Run, bytes | None]] = []
        """Runs of one row that were answered in this turn of the event loop, and the JSON of what
        they came to."""

    def check(self, row: BaseFeatures, prediction: Outcome | None) -> None:
        """
        Raises:
            TypeError: it is not known when two rows of this kind are equal.
            ValueError: what is read from the JSON of a prediction is something else.
        """
        key = self.key(row)
        if custom := _custom_parts(self._prediction.__pydantic_core_schema__):
            raise ValueError(f"a Prediction has validators or serializers of its own ({custom})")
        content = self._to_json(prediction, by_alias=True)
        read = self._read(self._value(key, content, time()))
        if read is None or self._to_json(read.prediction, by_alias=True) != content:
            raise ValueError("a Prediction cannot be read from its own JSON")

    def key(self, row: BaseFeatures) -> Key:
        """
        Raises:
            TypeError: it is not known when two rows of this kind are equal.
        """
        keyed = self._hash.copy()
        keyed.update(self._canonical(row))
        return keyed.digest()

    def recall(self, key: Key) -> Recalled | None:
        """What is in memory of a row, as it was said."""
        value = self._memory.get(key)
        if value is None:
            return None
        # Here is nothing that this process has not written, so it need not be looked through.
        _, said, _ = HEAD.unpack_from(value)
        age_s = time() - said
        if not self._is_fresh(age_s):
            return None
        self.metrics.memory_hit()
        self._passed_by.found()
        return Recalled(value[HEAD.size :], max(0.0, age_s))

    def note_body(self, body: bytes, row: BaseFeatures) -> None:
        """`row`, and it alone, was read from `body`, and its answer was known."""
        if self.bodies and len(body) <= MAX_BODY_BYTES:
            self.bodies.note(body, self.key(row))

    def _catch_up(self, body: bytes, rows: Sequence[BaseFeatures]) -> None:
        """Do what was left out for the same `rows`, if they were passed by lately."""
        passed_by = self._passed_by.get(body)
        if not passed_by or (isinstance(passed_by, Run) and passed_by.keys):
            return
        try:
            keys = tuple(map(self.key, rows))
        except TypeError:
            return
        if isinstance(passed_by, Run):
            passed_by.keys = keys
            for key in keys:
                self._flights.under_way.setdefault(key, passed_by)
        elif not self._memory.get(keys[0]):
            self._put({keys[0]: self._value(keys[0], passed_by, time())})

    def key_of_new(
        self, rows: Sequence[BaseFeatures], body: bytes | None, *, refresh: bool
    ) -> Key | None:
        """By what `rows`, from `body`, are to `lead`: the key of the only one, if nothing is known
        of it here, nobody asks the model for it, and the shared store is not to be asked, or if it
        is to `refresh` what is known; PASSED_BY, if all that is not worth its time. None: `answer`
        does all there is to it.

        Args:
            body: None: it tells nothing, or the model takes much longer than what is done here.
        """
        if refresh:
            self._passed_by.forget()
        elif body is not None and not self._lock_s:
            if self._passed_by.takes(body, len(rows)):
                return PASSED_BY
            self._catch_up(body, rows)
        if len(rows) != 1 or self._lock_s:
            return None
        try:
            key = self.key(rows[0])
        except TypeError:
            return None
        if not refresh:
            if key in self._flights.under_way or self._memory.get(key):
                return None
            if self._shared and self._lookups_for(1):
                return None
        self.metrics.missed(1)
        return key

    def lead(self, key: Key, run: Run, rows: int) -> None:
        """The model is asked for so many rows, and others can follow `run` until it is ended; if
        they are passed by, once the same body comes again."""
        if key:
            run.keys = (key,)
            self._flights.under_way[key] = run
            return
        self._passed_by.add(run, rows)

    async def answer(
        self,
        rows: Sequence[BaseFeatures],
        submit: Submit,
        deadline: float,
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
            key, *others = map(self.key, rows)
        except TypeError:
            # The example had nothing of the kind: an optional field, say.
            return await outcomes_of(partial(submit, rows)), None, None
        if others:
            return await self._answer_many((key, *others), rows, submit, deadline, refresh)
        # As that does, in half the time.
        if not refresh:
            known = self._recall(key)
            if known is None and self._shared and key not in self._flights.under_way:
                value = await self._shared.get(self._name(key), deadline)
                known = self._found(self._shared, key, value)
            if known:
                return [known.prediction], _age_s(known), None
        self.metrics.missed(1)
        is_retry = False
        while True:
            run = None if refresh else self._flights.under_way.get(key)
            if run is None:
                run = self._lead((key,), rows, submit, deadline, refresh)
                run.is_retry = is_retry
                outcomes: Sequence[Outcome] = ()
                try:
                    outcomes = await run.leader
                finally:
                    content = self.end(run, outcomes)
                    del run
                return outcomes, None, content
            self.metrics.followers.inc()
            run.is_retry |= is_retry
            said = await self._flights.follow(run, deadline)
            if said:
                self._passed_by.found()
                return [said[key]], None, None
            is_retry = True

    def end(self, run: Run, outcomes: Sequence[Outcome]) -> bytes | None:
        """Who leads `run` has its outcomes; none: it gives up, or the model did.

        Returns:
            The JSON of the only prediction, if it was made here to be kept.
        """
        ticket = run.ticket
        if ticket.outlet is not run.leader:
            self._flights.part(run, run.leader)
            return None
        ticket.withdraw()
        if not run.keys:
            # The answer needs the JSON anyway.
            content = self._content(outcomes[0]) if len(outcomes) == 1 else None
            self._passed_by.end(run, content)
            return content
        if not outcomes:
            self._flights.end(run)
            return None
        if self._lock_s or len(outcomes) > 1:
            self._flights.land(run, outcomes)
            return None
        content = self._content(outcomes[0])
        # In the next turn of the loop, with all that end in this one: together they take half the
        # time. Until then who asks the same gets it from the run.
        if not self._ended:
            self._loop.call_soon(self._keep_all, context=Context())
        self._ended.append((run, content))
        return content

    async def _answer_many(
        self,
        keys: Keys,
        rows: Sequence[BaseFeatures],
        submit: Submit,
        deadline: float,
        refresh: bool,
    ) -> Answered:
        row_of = dict(zip(keys, rows, strict=True))
        known: dict[Key, _Known] = {}
        if not refresh:
            known = {key: found for key in row_of if (found := self._recall(key))}
            unknown = [key for key in row_of if key not in known]
            if self._shared and unknown:
                unknown = unknown[: self._lookups_for(len(unknown))]
                known |= await self._recall_shared(self._shared, unknown, deadline)
            if len(known) == len(row_of):
                oldest = min(known.values(), key=attrgetter("said"))
                return [known[key].prediction for key in keys], _age_s(oldest), None
        said: dict[Key, Outcome] = {key: found.prediction for key, found in known.items()}
        self.metrics.missed(len(row_of) - len(said))
        flights, under_way = self._flights, self._flights.under_way
        is_retry = False
        while missing := [key for key in row_of if key not in said]:
            runs = {under_way[key] for key in missing if key in under_way and not refresh}
            to_follow = {key for run in runs for key in run.keys}
            to_lead = tuple(key for key in missing if key not in to_follow)
            self.metrics.followers.inc(len(runs))
            for run in runs:
                run.is_retry |= is_retry
            joined = [(run, flights.join(run, deadline)) for run in runs]
            try:
                if to_lead:
                    led = [row_of[key] for key in to_lead]
                    run = self._lead(to_lead, led, submit, deadline, refresh)
                    run.is_retry = is_retry
                    outcomes: Sequence[Outcome] = ()
                    try:
                        outcomes = await run.leader
                    finally:
                        self.end(run, outcomes)
                        del run
                    said |= dict(zip(to_lead, outcomes, strict=True))
                # An error knows this frame by its traceback; the frame must not know the error.
                for number in range(len(joined)):
                    if others_said := await joined[number][1]:
                        self._passed_by.found()
                        said |= others_said
            finally:
                while joined:
                    flights.part(*joined.pop())
            is_retry = True
        return [said[key] for key in keys], None, None

    def _lead(
        self,
        keys: Keys,
        rows: Sequence[BaseFeatures],
        submit: Submit,
        deadline: float,
        refresh: bool,
    ) -> Run:
        """Have the model asked of `rows`, for all who follow; to be ended by who called this."""
        leader: asyncio.Future[Sequence[Outcome]] = PromptFuture(loop=self._loop)
        if self._lock_s and self._shared and not refresh:
            row_of, others = dict(zip(keys, rows, strict=True)), self._others(self._shared, leader)
            ticket: Ticket[Outcome] = SharedRun(row_of, submit, leader, deadline, others)
        else:
            ticket = submit(rows, leader)
        run = Run(keys, leader, deadline, ticket)
        for key in keys:
            self._flights.under_way[key] = run
        return run

    def _others(self, shared: SharedStore, leader: asyncio.Future[Sequence[Outcome]]) -> Others:
        # Of the leader and not of its run, which knows this.
        def is_current(key: Key) -> bool:
            run = self._flights.under_way.get(key)
            return run is not None and run.leader is leader

        def names(keys: Sequence[Key]) -> list[bytes]:
            return [b"%b:lock" % self._name(key) for key in keys]

        async def take(keys: Sequence[Key], deadline: float) -> Sequence[bool]:
            return await shared.take(names(keys), self._lock_s, deadline)

        def release(keys: Sequence[Key]) -> None:
            for name in names(keys):
                shared.discard(name)

        async def recall(keys: Sequence[Key], deadline: float) -> Mapping[Key, Outcome]:
            known = await self._recall_shared(shared, keys, deadline)
            return {key: found.prediction for key, found in known.items()}

        def keep(keys: Sequence[Key], outcomes: Sequence[Outcome]) -> None:
            said = zip(keys, outcomes, strict=True)
            self._keep({key: outcome for key, outcome in said if is_current(key)})

        return Others(self._lock_s, take, release, recall, keep)

    def _recall(self, key: Key) -> _Known | None:
        """What is in memory."""
        value = self._memory.get(key)
        if value is None:
            return None
        if known := self._read(value):
            self.metrics.memory_hit()
            self._passed_by.found()
        else:
            self._memory.discard(key)
        return known

    def _lookups_for(self, rows: int) -> int:
        """For how many of so many rows the shared store is to be asked."""
        # With locks it is asked before each run anyway.
        asked = rows if self._lock_s else self._lookups.take(rows)
        if asked < rows:
            self.metrics.not_looked_up(rows - asked)
        return asked

    async def _recall_shared(
        self, shared: SharedStore, keys: Sequence[Key], deadline: float
    ) -> Mapping[Key, _Known]:
        """What is in `shared`, or has come into memory meanwhile."""
        values = [(key, shared.get(self._name(key), deadline)) for key in keys]
        found = {key: self._found(shared, key, await value) for key, value in values}
        return {key: known for key, known in found.items() if known}

    def _found(self, shared: SharedStore, key: Key, value: bytes | None) -> _Known | None:
        """What has come into memory while others were asked, or else `value`, which they gave."""
        known = self._recall(key)
        if known or value is None:
            return known
        if self._is_ours(key, value):
            known = self._read(value)
        else:
            self.metrics.invalid.inc()
        if known:
            # As it would be said: what was read may be written in other ways.
            if content := self._content(known.prediction):
                self._memory.put({key: self._value(key, content, known.said)})
            self.metrics.show_bytes(self._memory.bytes_held)
            self.metrics.redis_hits.inc()
            self._lookups.give(EARNED_BY_HIT)
            self._passed_by.found()
        else:
            shared.discard(self._name(key))
        return known

    def _name(self, key: Key) -> bytes:
        return self._prefix + hexlify(key)

    def _value(self, key: Key, content: bytes, said: float) -> bytes:
        """What is kept of a prediction whose JSON is `content`."""
        value = HEAD.pack(FORMAT, said, UNSEALED) + content
        return self._sealed(key, value) if self._shared else value

    def _sealed(self, key: Key, value: bytes) -> bytes:
        """`value` with the digest that belongs to it under `key`."""
        begin, content = value[: HEAD.size - len(UNSEALED)], value[HEAD.size :]
        seal = self._seals.copy()
        seal.update(key + begin + content)
        return begin + seal.digest() + content

    def _is_ours(self, key: Key, value: bytes) -> bool:
        is_whole = len(value) >= HEAD.size and value[0] == FORMAT
        return is_whole and compare_digest(value, self._sealed(key, value))

    def _read(self, value: bytes) -> _Known | None:
        """What `value` says, unless it is too old, or not of this schema."""
        said = HEAD.unpack_from(value)[1]
        if not self._is_fresh(time() - said):
            return None
        try:
            return _Known(self._from_json(value[HEAD.size :]), said)
        # A validator of the predictor's can raise anything.
        except Exception:
            self.metrics.invalid.inc()
            return None

    def _content(self, outcome: Outcome) -> bytes | None:
        """Its JSON, if it is to be kept: no ItemError, nor what has more to it than can be read
        again, nor what cannot be said in JSON."""
        if type(outcome) is not self._prediction:
            return None
        try:
            return self._to_json(outcome, by_alias=True)
        # What a predictor makes without validation can be anything.
        except Exception:
            return None

    def _is_fresh(self, age_s: float) -> bool:
        # Not a number is not.
        return -MAX_SKEW_S <= age_s < self._ttl_s

    def _keep_all(self) -> None:
        """Keep what runs of one row came to, unless somebody has asked again meanwhile."""
        ended, self._ended = self._ended, []
        under_way, now, values = self._flights.under_way, time(), {}
        for run, content in ended:
            (key,) = run.keys
            if under_way.get(key) is run:
                del under_way[key]
                if content is not None:
                    values[key] = self._value(key, content, now)
        self._put(values)

    def _keep_run(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """As `_keep_all`, at once."""
        # What a shared run says has been kept, or is what another process said.
        if not isinstance(run.ticket, SharedRun):
            said, under_way = zip(run.keys, outcomes, strict=True), self._flights.under_way
            self._keep({key: outcome for key, outcome in said if under_way.get(key) is run})

    def _keep(self, said: Mapping[Key, Outcome]) -> None:
        contents, now = {key: self._content(outcome) for key, outcome in said.items()}, time()
        self._put(
            {key: self._value(key, content, now) for key, content in contents.items() if content}
        )

    def _put(self, values: Mapping[Key, bytes]) -> None:
        self._memory.put(values)
        if self._shared:
            named = {self._name(key): value for key, value in values.items()}
            self._shared.put(named, self._ttl_s)
        self.metrics.show_bytes(self._memory.bytes_held)


def _custom_parts(schema: Any) -> str:
    """Names a part of a core schema whose JSON may be read as something else, if there is one."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if isinstance(kind, str) and (kind.startswith("function-") or kind == "generator"):
            return kind
        return next(filter(None, map(_custom_parts, schema.values())), "")
    if isinstance(schema, list | tuple):
        return next(filter(None, map(_custom_parts, schema)), "")
    return ""


def _age_s(known: _Known) -> float:
    # The clocks of two machines may differ.
    return max(0.0, time() - known.said)
