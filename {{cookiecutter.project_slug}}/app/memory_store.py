"""Cached answers in this process: those that were not asked for the longest go first."""

from collections import OrderedDict

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

    def put(self, key: bytes, value: bytes) -> None:
        """Keep `value`, unless it is larger than all that may be held."""
        if key in self._values:
            self.discard(key)
        size = len(value) + ENTRY_OVERHEAD_BYTES
        if size > self._max_bytes:
            return
        self._values[key] = value
        self.bytes_held += size
        while self.bytes_held > self._max_bytes:
            _, oldest = self._values.popitem(last=False)
            self.bytes_held -= len(oldest) + ENTRY_OVERHEAD_BYTES

    def discard(self, key: bytes) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.bytes_held -= len(value) + ENTRY_OVERHEAD_BYTES
