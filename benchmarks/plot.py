"""A bar chart as SVG by hand: two columns of panels, light or dark as the reader's system is."""

from dataclasses import dataclass
from html import escape

COLUMN_WIDTH = 430
LABEL_WIDTH = 178
BAR_WIDTH = 185
BAR_STEP = 22
BAR_HEIGHT = 15
HEAD = 48
MARGIN = 16

STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #24292f; }
    .background { fill: #ffffff; }
    .title { font-weight: 600; font-size: 13px; }
    .unit { fill: #57606a; font-size: 11px; }
    .bar { fill: #b6bfc9; }
    .ours { fill: #0969da; }
    .name-ours { font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .background { fill: #0d1117; }
      .unit { fill: #8d96a0; }
      .bar { fill: #484f58; }
      .ours { fill: #4493f8; }
    }
"""


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    text: str
    is_ours: bool


@dataclass(frozen=True)
class Panel:
    """Bars on a scale of their own."""

    title: str
    unit: str
    bars: list[Bar]

    @property
    def height(self) -> int:
        return HEAD + BAR_STEP * len(self.bars)


def draw(panels: list[Panel]) -> str:
    """`panels` from left to right, two in a row."""
    elements: list[str] = []
    top = MARGIN
    for first in range(0, len(panels), 2):
        row = panels[first : first + 2]
        for column, panel in enumerate(row):
            elements += _panel(panel, MARGIN + column * COLUMN_WIDTH, top)
        top += max(panel.height for panel in row) + MARGIN
    width = 2 * COLUMN_WIDTH + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" '
        f'width="{width}" height="{top}" role="img" aria-label="Benchmark: throughput, where '
        'longer bars are better, and latency, where shorter ones are">\n'
        f"  <style>{STYLE}  </style>\n"
        f'  <rect class="background" width="{width}" height="{top}"/>\n'
        + "".join(f"  {element}\n" for element in elements)
        + "</svg>\n"
    )


def _panel(panel: Panel, left: int, top: int) -> list[str]:
    elements = [
        _text(left, top + 14, panel.title, "title"),
        _text(left, top + 30, panel.unit, "unit"),
    ]
    longest = max((bar.value for bar in panel.bars), default=0) or 1
    for number, bar in enumerate(panel.bars):
        y = top + HEAD - 8 + number * BAR_STEP
        width = max(1.0, bar.value / longest * BAR_WIDTH)
        kind = "bar ours" if bar.is_ours else "bar"
        start = left + LABEL_WIDTH
        size = f'width="{width:.1f}" height="{BAR_HEIGHT}" rx="2"'
        elements += [
            _text(left, y + 12, bar.name, "name-ours" if bar.is_ours else ""),
            f'<rect class="{kind}" x="{start}" y="{y}" {size}/>',
            _text(round(start + width) + 6, y + 12, bar.text, ""),
        ]
    return elements


def _text(x: int, y: int, text: str, kind: str) -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x}" y="{y}">{escape(text)}</text>'
