"""What parts of a request's way take, in a loop: us of CPU, as JSON, the least of some repetitions.

Runs within the project that the benchmark serves. In a loop the CPU's caches have all there is to
it, so this is the least that a part can take; it is to tell a large one from a small one.
"""

import asyncio
import json
from collections.abc import Callable
from hashlib import sha256
from time import monotonic, process_time
from typing import Any

from app.api.bodies import Bodies
from app.api.json_route import Call
from app.api.keys import ApiKeys
from app.api.middleware import request_id_of
from app.canonical import Canonical
from app.deadlines import Deadlines
from app.known_bodies import KnownBodies
from app.main import create_app
from app.protocol import headers_of

CALLS = 5000
REPETITIONS = 20
LINES = [
    (b"host", b"127.0.0.1"),
    (b"accept", b"*/*"),
    (b"content-type", b"application/json"),
    (b"content-length", b"160"),
]


def us(part: Callable[[], Any]) -> float:
    least = float("inf")
    for _ in range(REPETITIONS):
        started = process_time()
        for _ in range(CALLS):
            part()
        least = min(least, process_time() - started)
    return least / CALLS * 1e6


async def main() -> None:
    app = create_app()
    await app.lifecycle.start()
    route = app.routes["/v1/predict"]
    predictor = route.model.predictor_class
    body = json.dumps({"features": predictor.example.model_dump(mode="json")}).encode()
    headers = headers_of(LINES)
    key, digest = b"k" * 43, sha256(b"k" * 43).hexdigest()
    others = [sha256(b"%d" % number).hexdigest() for number in range(9)]
    one, ten = ApiKeys([digest]), ApiKeys([*others, digest])
    bodies, deadlines, known = Bodies(2**20, 2**26), Deadlines(print), KnownBodies()
    known.note(body, b"key")
    canonical, deadline = Canonical(predictor.features).of, monotonic() + 60

    def hold() -> None:
        bodies.hold(len(body))
        bodies.release(len(body))

    def expect() -> None:
        deadlines.add(body, deadline)
        deadlines.discard(body)

    steering = headers | {b"x-request-timeout-ms": b"500", b"priority": b"u=1"}
    parts: dict[str, Callable[[], Any]] = {
        "a call of an empty function": lambda: None,
        "headers into a mapping": lambda: headers_of(LINES),
        "a request id, made": lambda: request_id_of(headers),
        "a request id, the caller's": lambda: request_id_of({b"x-request-id": b"a" * 32}),
        "API keys, none set": lambda: ApiKeys([]).check(headers),
        "an API key": lambda: one.check({b"x-api-key": key}),
        "an API key, ten set": lambda: ten.check({b"x-api-key": key}),
        "may it come in: key, time-out, queue": lambda: route.admit(Call("", monotonic(), headers)),
        "the same, with a time-out and a priority of its own": lambda: route.admit(
            Call("", monotonic(), steering)
        ),
        "a deadline, set and met": expect,
        "a body over 16 KiB, counted and released": hold,
        "JSON to a valid row": lambda: route._parse(body),  # noqa: SLF001
        "whether a body is known, and it is": lambda: known.key_of(body),
        "the canonical form of a row": lambda: canonical(predictor.example),
    }
    print(json.dumps({name: us(part) for name, part in parts.items()}))
    await app.lifecycle.stop()


asyncio.run(main())
