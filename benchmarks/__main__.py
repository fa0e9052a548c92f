"""The benchmark's command line: `python -m benchmarks`, which `make bench` runs."""

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.contestants import contestants
from benchmarks.environments import BUILD, MODELS, REPOSITORY, make_place
from benchmarks.machine import describe
from benchmarks.report import write_report
from benchmarks.sections import OURS, SECTIONS, Bench
from benchmarks.workloads import WORKLOADS, make_models, make_workload


def names(known: list[str]) -> Any:
    """A parser of names separated by commas."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := set(given) - set(known):
            raise argparse.ArgumentTypeError(
                f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}"
            )
        return [name for name in known if name in given]

    return parse


def parse_arguments() -> argparse.Namespace:
    known = list(contestants())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--section", choices=list(SECTIONS), help="only this one")
    parser.add_argument("--workloads", type=names(list(WORKLOADS)), default=list(WORKLOADS))
    parser.add_argument("--contestants", type=names(known), default=known)
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument("--seconds", type=float, default=4, help="for each point")
    parser.add_argument("--quick", action="store_true", help="one round of 1 s, to see it work")
    parser.add_argument(
        "--template", type=Path, default=REPOSITORY, help="another checkout of the template"
    )
    parser.add_argument("--output", type=Path, help="where the report goes")
    parser.add_argument("--report", action="store_true", help="write it again, measure nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 1.0
    # A quick run is no result, and replaces none.
    arguments.results = BUILD / ("quick" if arguments.quick else "") / "results.json"
    if arguments.output is None:
        arguments.output = arguments.results.parent if arguments.quick else Path(__file__).parent
    return arguments


def set_up(arguments: argparse.Namespace) -> Bench:
    """Environments, models, request bodies, right answers."""
    BUILD.mkdir(parents=True, exist_ok=True)
    make_models(MODELS)
    chosen = {name: entry for name, entry in contestants().items() if name in arguments.contestants}
    workloads = {name: make_workload(name, MODELS) for name in arguments.workloads}
    places = {}
    for name in chosen:
        print(f"setting up {name}", flush=True)
        places[name] = make_place(name, arguments.template.absolute())
    warm_up_s = 0.5 if arguments.quick else 1.5
    return Bench(chosen, places, workloads, arguments.rounds, arguments.seconds, warm_up_s)


def main() -> None:
    arguments = parse_arguments()
    path: Path = arguments.results
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        bench = set_up(arguments)
        for name in [arguments.section] if arguments.section else SECTIONS:
            if name != "main" and OURS not in bench.contestants:
                continue
            started = perf_counter()
            print(f"\n{name}", flush=True)
            measurements = SECTIONS[name](bench)
            results[name] = {
                "date": datetime.now(UTC).isoformat(timespec="minutes"),
                "rounds": bench.rounds,
                "seconds": bench.seconds,
                "minutes": round((perf_counter() - started) / 60, 1),
                "machine": describe(bench, arguments.template.absolute()),
                "measurements": measurements,
            }
            # After each, as a later one may fail or be stopped.
            path.write_text(json.dumps(results, indent=1) + "\n")
    if not results:
        sys.exit("nothing has been measured yet")
    for written in write_report(results, arguments.output):
        print(f"wrote {os.path.relpath(written)}")


if __name__ == "__main__":
    main()
