"""Which row a body holds, if the same body came before: then it need not be read again."""

import hashlib

MAX_BODIES = 10_000
"""Of one model, some 250 bytes each. The oldest goes first; one that is in use comes back."""

MAX_BODY_BYTES = 65_536
"""Of the longest that is noted. What is longer is seldom sent twice, byte for byte."""

DIGEST_BYTES = 32


class KnownBodies:
    """Keys of rows, by the body that held one. Holds digests of bodies, and no inputs.

    Only the digest tells two bodies apart; Python's hash, for a tenth of the time, tells whether
    there is one to compare with, which for a body that is new there mostly is not.
    """

    def __init__(self) -> None:
        self._entries: dict[int, bytes] = {}

    def key_of(self, body: bytes) -> bytes | None:
        """Of the row in `body`, as far as is known."""
        if len(body) > MAX_BODY_BYTES:
            return None
        entry = self._entries.get(hash(body))
        if entry is None or not entry.startswith(_digest(body)):
            return None
        return entry[DIGEST_BYTES:]

    def note(self, body: bytes, key: bytes) -> None:
        """`body` holds the row with that `key`."""
        self._entries[hash(body)] = _digest(body) + key
        if len(self._entries) > MAX_BODIES:
            del self._entries[next(iter(self._entries))]


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
