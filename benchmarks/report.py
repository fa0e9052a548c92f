"""Writes report.md from the measurements: medians, ratios, and whether the targets are met."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants import contestants
from benchmarks.plot import Bar, Panel, draw
from benchmarks.sections import BATCHED, MANY, OURS, POLICIES
from benchmarks.workloads import WORKLOADS

BARE, TUTORIAL = "bare_asgi", "tutorial_fastapi"

Number = float | None

HEAD = """\
Written by `python -m benchmarks`; [README.md](README.md) says how it measures. Trust ratios
within a table, not figures across machines.
"""

OPEN_LOOP = """\
Requests at random times, at a share of what the same contestant answered with 32 connections;
latency counts from when a request was due.
"""

PROCESSES = """\
After the load, all processes of a contestant together: RSS counts what two processes share twice,
PSS once. Cold start is from the start of the process to the first 200 of its ready URL.
"""

GROWTH = """\
This template on W2, rows a second by connections and rows in a request. A forest costs nearly the
same for one row as for 32, so throughput grows with the rows that are there together, up to the 32
of a batch (BATCH_MAX_ROWS); what is there beyond that waits its turn.
"""

POLICY = """\
This template, its learned wait and fixed windows (BATCH_POLICY=window), which have to be chosen;
all are up at once and asked in turns, of a tenth of a second for W1 and a second for W2. In the
open loop all are offered the same: a share of what the learned wait answered with 32 connections
just before. A p99 is the median of the turns' own: a stall of the machine is in one of them.
Best of a column in bold. Below, each round of the learned wait and of the window with the best
median; it is ahead or behind if all of its rounds are.
"""

PARTS = """\
What parts of a request's way take in the service's process, in a loop, where the CPU's caches have
all there is to them: the least of twenty repetitions, the median of the rounds. A request for W1
takes 40 to 80 us in all. What metrics, the log, drift and traces take is in observability.md, side
by side.
"""

THREE_QUARTERS = """\
Each longest wait (BATCH_MAX_WAIT_MS): what the service answers over 32 connections, beside the
usual settings just before; and of three quarters of that, at random times, what it answers. Medians
over the rounds, each with a start of its own. If the same service answers less afterwards, by more
than a tenth, the machine became slower, and it is tried again, three times at the most; rounds that
stay so are left out where there are others.
"""


class Figures:
    """The measurements of all sections, by what they are of."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results
        self.titles = {name: entry.title for name, entry in contestants().items()}

    def has(self, section: str) -> bool:
        return section in self._results

    def about(self, section: str) -> dict[str, Any]:
        about: dict[str, Any] = self._results[section]
        return about

    def all(self, section: str, **where: Any) -> list[dict[str, Any]]:
        if section not in self._results:
            return []
        return [
            entry
            for entry in self._results[section]["measurements"]
            if all(entry.get(key) == value for key, value in where.items())
        ]

    def median(self, section: str, what: str, **where: Any) -> Number:
        """Over the rounds."""
        values = [
            entry[what] for entry in self.all(section, **where) if entry.get(what) is not None
        ]
        return median(values) if values else None

    def main(self, what: str, workload: str, contestant: str, point: str) -> Number:
        return self.median("main", what, workload=workload, contestant=contestant, point=point)

    def ratio(self, what: str, workload: str, point: str, other: str, one: str = OURS) -> Number:
        """Of `one` to `other`: the median over the turns in which both took part."""
        mine, theirs = (
            {
                (entry["round"], entry.get("turn")): entry[what]
                for entry in self.all("main", workload=workload, contestant=name, point=point)
            }
            for name in (one, other)
        )
        ratios = [mine[turn] / theirs[turn] for turn in mine if theirs.get(turn)]
        return median(ratios) if ratios else None

    def values(self, section: str, key: str) -> list[Any]:
        """What occurs under `key`, in order of appearance."""
        return list(dict.fromkeys(entry[key] for entry in self.all(section) if key in entry))


CACHE = """This template over one connection and over 32: without the cache, with it in memory, and
with Redis alone (CACHE_MAX_BYTES=0), which shares the load generator's core. By the part of the
requests that were sent before; of the others, none comes twice. Of a model that takes hardly longer
than the cache most of these go to it as without a cache, once it was sent 2,000 of them. The three
are asked in turns, of a tenth of a second for W1, and ratios are medians over these turns.
"""


@dataclass(frozen=True)
class Target:
    text: str
    bound: float
    is_at_least: bool
    value: Callable[[Figures], Number]

    def row(self, figures: Figures) -> list[str]:
        value = self.value(figures)
        sign = "at least" if self.is_at_least else "at most"
        if value is None:
            return [self.text, f"{sign} {self.bound}", "", "not measured"]
        is_met = value >= self.bound if self.is_at_least else value <= self.bound
        return [
            self.text,
            f"{sign} {self.bound}",
            f"{value:.2f}",
            "met" if is_met else "**missed**",
        ]


def _throughput(workload: str, other: str, bound: float) -> Target:
    names = {BARE: "bare ASGI", BATCHED: "bare ASGI with batcher", TUTORIAL: "tutorial app"}
    text = f"{workload.upper()}, 32 connections: throughput to {names[other]}"
    return Target(text, bound, True, lambda f: f.ratio("per_s", workload, "closed 32", other))


def _alone(workload: str, bound: float) -> Target:
    text = f"{workload.upper()}, 1 connection: p50 to bare ASGI"
    return Target(text, bound, False, lambda f: f.ratio("p50_ms", workload, "closed 1", BARE))


def _process(what: str, text: str, workload: str, bound: float) -> Target:
    return Target(
        f"{text}, {workload.upper()}, to tutorial app",
        bound,
        False,
        lambda f: f.ratio(what, workload, "process", TUTORIAL),
    )


def _two_workers(figures: Figures) -> Number:
    one = figures.median("growth", "per_s", point="workers", workers=1)
    two = figures.median("growth", "per_s", point="workers", workers=2)
    return two / one if one and two else None


TARGETS = [
    _throughput("w1", BATCHED, 0.70),
    _throughput("w1", TUTORIAL, 2.5),
    _alone("w1", 1.3),
    _throughput("w2", BATCHED, 1.0),
    _throughput("w2", TUTORIAL, 15),
    _alone("w2", 1.05),
    _throughput("w3", BARE, 0.9),
    _throughput("w3b", BARE, 0.8),
    _throughput("w3b", TUTORIAL, 1.5),
    _process("rss_mb", "Memory (RSS)", "w1", 1.4),
    _process("rss_mb", "Memory (RSS)", "w2", 1.4),
    _process("cold_start_s", "Cold start", "w1", 1.5),
    Target("W2: two workers on two cores to one", 1.8, True, _two_workers),
]


CACHE_TARGETS = [
    ("W1, 32 connections, all in memory, to none: throughput", 1.3, True,
     ("per_s", "w1", 32, ("memory", "100%"), ("memory", "0%"))),
    ("W1, 32 connections, all in memory, to none: p50", 1.0, False,
     ("p50_ms", "w1", 32, ("memory", "100%"), ("memory", "0%"))),
    ("W1, 32 connections, none in memory, to no cache: throughput", 0.92, True,
     ("per_s", "w1", 32, ("memory", "0%"), ("off", "0%"))),
    ("W1, 32 connections, none in Redis, to no cache: throughput", 0.75, True,
     ("per_s", "w1", 32, ("redis", "0%"), ("off", "0%"))),
    ("W1, 32 connections, 16 rows a request, none in memory, to no cache: throughput", 0.92, True,
     ("per_s", "w1", 32, ("memory", "0%, 16 rows"), ("off", "0%, 16 rows"))),
    ("W1, 32 connections, 16 rows a request, none in Redis, to no cache: throughput", 0.75, True,
     ("per_s", "w1", 32, ("redis", "0%, 16 rows"), ("off", "0%, 16 rows"))),
    ("W2, 1 connection, all in Redis, to none: throughput", 10, True,
     ("per_s", "w2", 1, ("redis", "100%"), ("redis", "0%"))),
]  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: Number) -> str:
    """With about three digits."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def times(ratio: Number) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    figures = Figures(results)
    parts = [
        "# Benchmark\n",
        HEAD,
        _machine(figures),
    ]
    sections = {
        "main": _main,
        "growth": _growth,
        "policies": _policies,
        "cache": _cache,
        "parts": _parts,
        "gpu": _gpu,
    }
    if figures.has("main"):
        parts += ["![Throughput and latency](report.svg)\n", _targets(figures)]
    parts += [write(figures) for name, write in sections.items() if figures.has(name)]
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md"]
    written[0].write_text("\n".join(parts), encoding="utf-8")
    if figures.has("main"):
        written.append(folder / "report.svg")
        written[1].write_text(draw(_panels(figures)), encoding="utf-8")
    return written


def _machine(figures: Figures) -> str:
    rows = []
    for section in ("main", "growth", "policies", "cache", "parts", "gpu"):
        if not figures.has(section):
            continue
        about = figures.about(section)
        rows.append(
            [
                section,
                about["date"],
                about["machine"]["commit"],
                f"{about['rounds']} of {about['seconds']:g} s a point",
                f"{about['minutes']} min",
            ]
        )
    machine = about["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    pinned = {
        "apart": "The server has one core to itself and the load generator another.",
    }.get(machine["pinned"], "There is one core: the load generator takes part of the server's.")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"Linux {machine['kernel']}, Python {machine['python']}. {pinned} {packages}.\n\n"
        + table(["section", "date", "commit", "rounds", "took"], rows)
    )


def _targets(figures: Figures) -> str:
    rows = [target.row(figures) for target in TARGETS]
    return (
        "## Targets\n\n" + table(["ratio", "target", "measured", ""], rows) + "\n"
        "Targets against peers are not measured here: no peer is a contestant yet. The response\n"
        "cache is off but in its own section. What requests pay for metrics, logs, traces and\n"
        "drift is in [observability.md](observability.md).\n"
    )


def _main(figures: Figures) -> str:
    names = figures.values("main", "contestant")
    parts = ["## Side by side\n"]
    for workload in figures.values("main", "workload"):
        parts += [f"### {workload.upper()}: {WORKLOADS[workload]}\n", _workload(figures, workload)]
    parts += ["### Open loop\n", OPEN_LOOP, _open_loop(figures, names), "### Processes\n"]
    parts += [PROCESSES, _processes(figures, names), _checks(figures)]
    return "\n".join(parts)


def _workload(figures: Figures, workload: str) -> str:
    rows = []
    for name in figures.values("main", "contestant"):
        if failed := figures.all("main", workload=workload, contestant=name, point="failed"):
            rows.append([figures.titles[name], failed[0]["why"].splitlines()[0], *[""] * 9])
            continue

        def of(what: str, point: str, name: str = name) -> Number:
            return figures.main(what, workload, name, point)

        per_s = of("per_s", "closed 32")
        many = [number(of(what, "closed 32")) for what in ("p50_ms", "p95_ms", "p99_ms", "cpu_us")]
        alone = [number(of(what, "closed 1")) for what in ("p50_ms", "p99_ms")]
        ratios = [
            times(figures.ratio("per_s", workload, "closed 32", other, name))
            for other in (BARE, BATCHED, TUTORIAL)
        ]
        title = f"**{figures.titles[name]}**" if name == OURS else figures.titles[name]
        rows.append([title, number(per_s), *ratios, *many, *alone])
    head = [
        "", "req/s, 32 conn.", "to bare", "to batcher", "to tutorial",
        "p50 ms", "p95 ms", "p99 ms", "CPU us/req", "1 conn. p50 ms", "p99 ms",
    ]  # fmt: skip
    return table(head, rows)


def _open_loop(figures: Figures, names: list[str]) -> str:
    rows = []
    for workload in ("w1", "w2"):
        for name in names:
            for point in ("open 50%", "open 90%"):
                if not figures.all("main", workload=workload, contestant=name, point=point):
                    continue
                values = [
                    number(figures.main(what, workload, name, point))
                    for what in ("rate", "per_s", "p50_ms", "p95_ms", "p99_ms")
                ]
                unsent = sum(
                    entry["unsent"] + entry["lost"]
                    for entry in figures.all(
                        "main", workload=workload, contestant=name, point=point
                    )
                )
                share = point.removeprefix("open ")
                rows.append([workload.upper(), figures.titles[name], share, *values, str(unsent)])
    head = ["", "", "load", "offered/s", "answered/s", "p50 ms", "p95 ms", "p99 ms", "unanswered"]
    return table(head, rows)


def _processes(figures: Figures, names: list[str]) -> str:
    rows = []
    for workload in figures.values("main", "workload"):
        for name in names:
            values = [
                figures.main(what, workload, name, "process")
                for what in ("rss_mb", "pss_mb", "cold_start_s")
            ]
            if values[0] is not None:
                rows.append([workload.upper(), figures.titles[name], *map(number, values)])
    return table(["", "", "RSS MB", "PSS MB", "cold start s"], rows)


def _checks(figures: Figures) -> str:
    loads = [entry for entry in figures.all("main") if "checked" in entry]
    closed = [entry for entry in loads if entry["point"].startswith("closed")]
    others = [entry["others"] for entry in loads if entry.get("others") is not None]
    noise = (
        f"Other processes took {median(others):.0%} of the server's core in the median and "
        f"{max(others):.0%} at worst.\n"
        if others
        else ""
    )
    return (
        f"Before the clock ran, every request of every workload was asked once and its score "
        f"compared. While it ran, {sum(entry['checked'] for entry in loads):,} scores were "
        f"compared: {sum(entry['wrong'] for entry in loads)} wrong. The load generator was busy "
        f"for at most {max(entry['busy'] for entry in closed):.0%} of the time in a closed loop. "
        + noise
    )


def _growth(figures: Figures) -> str:
    def rows_per_s(connections: int, rows: int) -> str:
        per_s = figures.median("growth", "per_s", point="grid", connections=connections, rows=rows)
        return number(per_s * rows if per_s is not None else None)

    instances = figures.values("growth", "rows")
    grid = [
        [str(connections), *(rows_per_s(connections, rows) for rows in instances)]
        for connections in figures.values("growth", "connections")
    ]
    workers = [
        [str(count), *(
            number(figures.median("growth", what, point="workers", workers=count))
            for what in ("per_s", "p50_ms", "p99_ms")
        )]
        for count in figures.values("growth", "workers")
    ]  # fmt: skip
    parts = [
        "## Growth\n",
        GROWTH,
        table(["connections", *(f"{rows} rows/request" for rows in instances)], grid),
    ]
    if workers:
        scale = _two_workers(figures)
        parts += [
            "Workers on two cores, 64 connections. The load generator has no core of its own "
            "here and takes its part of the two; one worker is measured in the same way"
            + (f". Two give {scale:.2f} times one.\n" if scale else ".\n"),
            table(["workers", "req/s", "p50 ms", "p99 ms"], workers),
        ]
    return "\n".join(parts)


def _cache(figures: Figures) -> str:
    parts = ["## The response cache\n", CACHE]

    def median_of(what: str, workload: str, connections: int, tier: str, point: str) -> Number:
        asked = {"workload": workload, "connections": connections, "tier": tier, "point": point}
        return figures.median("cache", what, **asked)

    for workload in figures.values("cache", "workload"):
        loads = figures.all("cache", workload=workload)
        points = list(dict.fromkeys(entry["point"] for entry in loads))
        for connections in (1, MANY):
            rows = [
                [tier]
                + [
                    number(median_of(what, workload, connections, tier, point))
                    for what in ("per_s", "p50_ms")
                    for point in points
                ]
                for tier in figures.values("cache", "tier")
            ]
            head = ["", *(f"req/s, {point}" for point in points)]
            parts += [
                f"{workload.upper()}, {connections} connection{'s' * (connections > 1)}:\n",
                table([*head, *(f"p50 ms, {point}" for point in points)], rows),
            ]

    def to(
        what: str, workload: str, connections: int, ours: tuple[str, str], other: tuple[str, str]
    ) -> Number:
        asked = {"workload": workload, "connections": connections}
        mine, theirs = (
            _by_turn(what, figures.all("cache", tier=tier, point=f"known {point}", **asked))
            for tier, point in (ours, other)
        )
        ratios = [mine[turn] / theirs[turn] for turn in mine if theirs.get(turn)]
        return median(ratios) if ratios else None

    targets = [
        Target(text, bound, is_at_least, lambda _, asked=asked: to(*asked))  # type: ignore[misc]
        for text, bound, is_at_least, asked in CACHE_TARGETS
    ]
    rows = [target.row(figures) for target in targets]
    return "\n".join([*parts, table(["ratio", "target", "measured", ""], rows)])


def _parts(figures: Figures) -> str:
    rows = [
        [part, number(figures.median("parts", "us", part=part))]
        for part in figures.values("parts", "part")
    ]
    return "\n".join(["## The parts of a request\n", PARTS, table(["", "us"], rows)])


def _by_turn(what: str, entries: Sequence[Mapping[str, Any]]) -> dict[tuple[int, ...], float]:
    """Of each turn, or of each slice what is not told of each turn in it."""
    return {
        (entry["round"], entry["turn"], number): value
        for entry in entries
        for number, value in enumerate(entry["turns_per_s"] if what == "per_s" else [entry[what]])
    }


def _policies(figures: Figures) -> str:
    parts = [
        "## How long to wait\n",
        POLICY,
    ]
    for workload in figures.values("policies", "workload"):
        for what, title, best in (
            ("per_s", "requests a second", max),
            ("usual_p99_ms", "p99 in ms", min),
        ):
            points = [
                point
                for point in (
                    "closed 1",
                    "closed 2",
                    "closed 8",
                    "closed 32",
                    "open 50%",
                    "open 90%",
                )
                # In an open loop, all answer what they are offered.
                if what == "usual_p99_ms" or point.startswith("closed")
            ]
            values = {
                (policy, point): figures.median(
                    "policies", what, workload=workload, policy=policy, point=point
                )
                for policy in POLICIES
                for point in points
            }
            bests = {
                point: best(
                    (
                        value
                        for (_, at), value in values.items()
                        if at == point and value is not None
                    ),
                    default=None,
                )
                for point in points
            }
            rows = [
                [policy, *(_bold(values[policy, point], bests[point]) for point in points)]
                for policy in POLICIES
            ]
            parts += [f"{workload.upper()}, {title}:\n", table(["", *points], rows)]
            parts += [_noise(figures, what, workload, points)]
            head = ["", "learned", "best window", "", "learned is"]
            parts += [table(head, [_to_windows(figures, what, workload, at) for at in points])]
    parts += ["### Three quarters of the capacity\n", THREE_QUARTERS, _longest_waits(figures)]
    return "\n".join(parts)


def _to_windows(figures: Figures, what: str, workload: str, point: str) -> list[str]:
    """The learned wait beside the best of the windows, each round; whether they differ by more
    than the rounds of either do."""
    rounds = {
        policy: [entry[what] for entry in entries]
        for policy in POLICIES
        if (entries := figures.all("policies", workload=workload, policy=policy, point=point))
    }
    learned = rounds.pop("learned", None)
    if not (learned and rounds):
        return [point, "", "", "", "not measured"]
    # So that more is better.
    sign = -1 if what == "usual_p99_ms" else 1
    best = max(rounds, key=lambda policy: sign * median(rounds[policy]))
    ours, theirs = ([sign * value for value in each] for each in (learned, rounds[best]))
    verdict = "within the noise"
    if min(ours) > max(theirs):
        verdict = "ahead"
    elif max(ours) < min(theirs):
        verdict = "**behind**"
    shown = [" ".join(number(value) for value in sorted(each)) for each in (learned, rounds[best])]
    return [point, *shown, best, verdict]


def _noise(figures: Figures, what: str, workload: str, points: Sequence[str]) -> str:
    spreads = []
    for policy in POLICIES:
        for point in points:
            entries = figures.all("policies", workload=workload, policy=policy, point=point)
            values = [entry[what] for entry in entries if entry.get(what)]
            if len(values) > 1:
                spreads.append((max(values) - min(values)) / median(values))
    if not spreads:
        return ""
    return f"From round to round half of these differ by {median(spreads):.0%} or more.\n"


def _bold(value: Number, best: Number) -> str:
    return f"**{number(value)}**" if value is not None and value == best else number(value)


def _longest_waits(figures: Figures) -> str:
    rows = []
    point = {"point": "75%"}
    for workload in figures.values("policies", "workload"):
        for policy in figures.values("policies", "wait_policy"):
            for wait_ms in figures.values("policies", "wait_ms"):
                where = point | {"workload": workload, "wait_policy": policy, "wait_ms": wait_ms}
                entries = figures.all("policies", **where)
                steady = [entry for entry in entries if entry["is_steady"]]
                if not entries:
                    continue
                of_usual, due, per_s, p50_ms, p99_ms = (
                    median(entry[what] for entry in steady or entries)
                    for what in ("of_usual", "due_per_s", "per_s", "p50_ms", "p99_ms")
                )
                shares = sorted(entry["share"] for entry in steady or entries)
                # Some of those that were due last are not to be answered in time.
                held = sum(share > 0.95 for share in shares)
                verdict = "held" if held == len(shares) else f"**held {held} of {len(shares)}**"
                if not steady:
                    verdict = "the machine slowed down"
                values = [*map(number, (of_usual, due, per_s, p50_ms, p99_ms))]
                values.append(" ".join(f"{share:.0%}" for share in shares))
                of = f"{len(steady)} of {len(entries)}"
                name = figures.titles.get(policy, policy)
                rows.append([workload.upper(), name, str(wait_ms), *values, verdict, of])
    head = ["", "policy", "BATCH_MAX_WAIT_MS", "capacity, ratio", "due/s", "answered/s"]
    head += ["p50 ms", "p99 ms", "answered of due, each round", "", "steady rounds"]
    return table(head, rows)


def _gpu(figures: Figures) -> str:
    text = "## GPU\n\n"
    entries = figures.all("gpu", point="gpu")
    for why in dict.fromkeys(entry["why"].splitlines()[0] for entry in entries if "why" in entry):
        text += f"{why}\n\n"
    entries = [entry for entry in entries if "per_s" in entry]
    if not entries:
        return text
    keys = ("workload", "predictor", "rows", "device")
    rows = []
    for values in dict.fromkeys(tuple(entry[key] for key in keys) for entry in entries):
        where = dict(zip(keys, values, strict=True))
        cells = [
            number(figures.median("gpu", what, connections=connections, **where))
            for connections in (1, 32, 128)
            for what in ("per_s", "p50_ms")
        ]
        rows.append([*map(str, values), *cells])
    heads = [f"{what}, {count} conn." for count in (1, 32, 128) for what in ("req/s", "p50 ms")]
    return text + table(["", "predictor", "BATCH_MAX_ROWS", "device", *heads], rows)


def _panels(figures: Figures) -> list[Panel]:
    panels = []
    for workload in figures.values("main", "workload"):
        for what, point, unit in (
            ("per_s", "closed 32", "requests/s, 32 connections"),
            ("p50_ms", "closed 1", "p50 ms, 1 connection"),
        ):
            bars = [
                Bar(figures.titles[name], value, number(value), name == OURS)
                for name in figures.values("main", "contestant")
                if (value := figures.main(what, workload, name, point)) is not None
            ]
            panels.append(Panel(f"{workload.upper()}: {WORKLOADS[workload]}", unit, bars))
    return panels
