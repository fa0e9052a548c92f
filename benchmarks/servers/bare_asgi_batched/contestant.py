from pathlib import Path

from benchmarks.contestants import Command, Contestant, Place, plain_request, uvicorn


def start(place: Place, workload: str, port: int) -> Command:
    return uvicorn(place, Path(__file__).parent, workload, port)


CONTESTANT = Contestant(
    title="bare ASGI app with batcher",
    start=start,
    ready_path="/",
    request=plain_request("/"),
)
