"""Cached answers in this process: the least recently used go first, and none outlives its time."""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

ENTRY_OVERHEAD_BYTES = 400
"""What an entry takes beside its content, in CPython 3.11 on 64 bits; a test weighs it."""


class Entry(NamedTuple):
    stored: float
    """When the model gave this answer, in seconds since the epoch."""

    content: bytes


class MemoryStore:
    """Holds at most `max_bytes`, overhead included."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = monotonic) -> None:
        self.bytes_held = 0
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[float, Entry]] = OrderedDict()
        """With the time when each is too old, by `clock`."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        found = self._entries.get(key)
        if found is None:
            return None
        too_old_at, entry = found
        if self._clock() >= too_old_at:
            self.discard(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: Entry, ttl_s: float) -> None:
        """Keep `entry` for `ttl_s`, at the expense of those that were not asked for the longest."""
        self.discard(key)
        size = _size(entry)
        if size > self._max_bytes or ttl_s <= 0:
            return
        self._entries[key] = (self._clock() + ttl_s, entry)
        self.bytes_held += size
        while self.bytes_held > self._max_bytes:
            _, (_, oldest) = self._entries.popitem(last=False)
            self.bytes_held -= _size(oldest)

    def discard(self, key: bytes) -> None:
        found = self._entries.pop(key, None)
        if found:
            self.bytes_held -= _size(found[1])


def _size(entry: Entry) -> int:
    return len(entry.content) + ENTRY_OVERHEAD_BYTES
