"""Which row a body holds, if the same body came before: then it need not be read again."""

import hashlib
from collections import OrderedDict

MAX_BODIES = 10_000
"""Of one version of a model, some 250 bytes each; that which was not asked for the longest goes."""

MAX_BODY_BYTES = 65_536
"""Of the longest that is noted. What is longer is seldom sent twice, byte for byte."""

DIGEST_BYTES = 32


class KnownBodies:
    """Keys of rows, by the body that held one. Holds digests of bodies, and no inputs.

    Only the digest tells two bodies apart; Python's hash, for a tenth of the time, tells whether
    there is one to compare with, which for a body that is new there mostly is not.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[int, bytes] = OrderedDict()

    def key_of(self, body: bytes) -> bytes | None:
        """Of the row in `body`, as far as is known."""
        if not self._entries or len(body) > MAX_BODY_BYTES:
            return None
        found = hash(body)
        entry = self._entries.get(found)
        if entry is None or not entry.startswith(_digest(body)):
            return None
        self._entries.move_to_end(found)
        return entry[DIGEST_BYTES:]

    def note(self, body: bytes, key: bytes) -> None:
        """`body` holds the row with that `key`."""
        self._entries[hash(body)] = _digest(body) + key
        if len(self._entries) > MAX_BODIES:
            self._entries.popitem(last=False)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
