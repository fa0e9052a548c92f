"""Cached answers in this process: those that were not asked for the longest go first."""

from collections import OrderedDict
from collections.abc import Mapping

ENTRY_OVERHEAD_BYTES = 320
"""What an entry takes beside its value, in CPython 3.11 on 64 bits; a test weighs it."""


class MemoryStore:
    """Holds at most `max_bytes`, overhead included.

    Keys and values are bytes, which the garbage collector does not look at: with a hundred
    thousand objects of another kind its pauses would take milliseconds.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes_held = 0
        self._max_bytes = max_bytes
        self._values: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, key: bytes) -> bytes | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Keep `values` by their keys, but for those larger than all that may be held."""
        kept, most = self._values, self._max_bytes
        if not most:
            return
        for key in kept.keys() & values.keys():
            self.discard(key)
        sizes = list(map(len, values.values()))
        if sizes and max(sizes) + ENTRY_OVERHEAD_BYTES > most:
            self.put({key: value for key, value in values.items() if _size(value) <= most})
            return
        kept.update(values)
        held = self.bytes_held + sum(sizes) + len(sizes) * ENTRY_OVERHEAD_BYTES
        while held > most:
            held -= _size(kept.popitem(last=False)[1])
        self.bytes_held = held

    def discard(self, key: bytes) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.bytes_held -= _size(value)


def _size(value: bytes) -> int:
    return len(value) + ENTRY_OVERHEAD_BYTES
