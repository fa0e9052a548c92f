"""The trace that a caller's request belongs to, by its header `traceparent`."""

import re
from collections.abc import Mapping

TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
"""W3C Trace Context, section 3.2."""


def trace_id_of(headers: Mapping[bytes, bytes]) -> str | None:
    """That of the caller's `traceparent`, if it is one."""
    given = headers.get(b"traceparent")
    if given is None:
        return None
    found = TRACEPARENT.fullmatch(given)
    return found[1].decode() if found else None
