"""How the measurements are shown: tables, a picture, and advice, in at most 80 columns."""

import math
from collections.abc import Iterable, Sequence
from textwrap import fill

import plotext

from loadtest.batches import Batch
from loadtest.measure import Step
from loadtest.reasons import Advice, number, percent

WIDTH = 80
HEIGHT = 20
BUSY = 0.9
"""From here on the load test itself may have been what was slow."""

COLUMNS = ("answers/s", "p50 ms", "p95 ms", "p99 ms", "rows/batch", "queue ms", "CPU", "failed")


def show(text: str) -> None:
    """At once: a step takes its time."""
    print(text, flush=True)


def paragraph(text: str) -> str:
    return fill(text, WIDTH)


def heading(title: str, first: str) -> str:
    """Of a table of steps, above its columns; `first` is what was asked for."""
    return f"\n{paragraph(title)}\n\n{_line((first, *COLUMNS))}"


def row(step: Step) -> str:
    usage = step.usage
    return _line(
        (
            number(step.asked) if step.asked % 1 else f"{step.asked:,.0f}",
            number(step.per_s),
            number(step.p50_ms),
            number(step.p95_ms),
            number(step.p99_ms),
            *map(_optional, (usage.rows_per_batch, usage.queue_ms, usage.cpu)),
            percent(step.failed),
        )
    )


def batch_table(batches: Iterable[Batch]) -> str:
    lines = [f"{'rows':>11}{'ms':>10}{'rows/s':>10}"]
    lines += [f"{b.rows:>11}{b.ms:>10.3g}{number(b.rows_per_s):>10}" for b in batches]
    return "\n".join(lines)


def picture(steps: Sequence[Step]) -> str:
    """p50 and p99 of an open loop against its load; empty if there is nothing to see."""
    seen = [step for step in steps if math.isfinite(step.p99_ms)]
    if len(seen) < 2:
        return ""
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(WIDTH, HEIGHT)
    figure.title("Latency in ms, by requests a second")
    rates = [step.asked for step in seen]
    figure.ruler("x").ticks(rates[1::2], [number(rate) for rate in rates[1::2]])
    # Its own logarithmic scale takes no ticks.
    ticks = _log_ticks(min(step.p50_ms for step in seen), max(step.p99_ms for step in seen))
    figure.ruler("y").ticks(
        list(map(math.log10, ticks)),
        [f"{tick:.3g}" if tick < 1000 else f"{tick:.0f}" for tick in ticks],
    )
    curves = (("p99", "x", [s.p99_ms for s in seen]), ("p50", "o", [s.p50_ms for s in seen]))
    for name, marker, latencies in curves:
        points = figure.signal(rates, list(map(math.log10, latencies)), marker=marker)
        figure.draw(points.label(name).lines())
    drawn: str = plotext.uncolorize(str(figure.build()))
    return "\n".join(line.rstrip() for line in drawn.splitlines())


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 and so on, between the two; or these, if they are close."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def _plain(tick: float) -> str:
    return f"{tick:.3g}" if tick < 1000 else f"{tick:.0f}"


def notes(steps: Sequence[Step]) -> list[str]:
    """What a reader has to know of these steps."""
    said = []
    if any(step.client_cpu > BUSY for step in steps):
        said.append(
            "The load test itself had no CPU to spare at some steps, so what they show is at "
            "least in part its own limit. Run it on another machine, with --url."
        )
    if all(step.usage.rows_per_batch is None for step in steps):
        said.append(
            "The columns from the service's /metrics are empty: it shows none, or they are not of "
            "this load alone (one of several replicas, or other callers)."
        )
    return said


def advice(said: Iterable[Advice]) -> str:
    paragraphs = (
        fill(text, WIDTH, initial_indent=f"{name:<16}", subsequent_indent=" " * 16)
        for name, text in said
    )
    return "\n".join(paragraphs)


def _line(cells: Sequence[str]) -> str:
    widths = (11, 10, 8, 8, 8, 11, 9, 6, 8)
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _optional(value: float | None) -> str:
    return "-" if value is None else number(value)
