"""The loss over a run, to be seen: loss.svg for a browser, and a plot for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosetrainer.durable_files import write_whole
from rosetrainer.reporting.screen import encodes

CURVE = "loss.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 16, 40, 48
"""Pixels: the picture, and the margins around the axes."""

NARROWEST = 40
"""Columns that a plot takes at least."""

MOST_POINTS = 600
"""Of the training loss in the picture; each is a mean of neighbours if there are more steps."""

STYLE = """
  svg { background: #ffffff; color: #24292f; font: 13px sans-serif }
  text { fill: currentColor } .grid { stroke: currentColor; opacity: 0.2 }
  .train { fill: none; stroke: #2f7fd0; stroke-width: 1.5 }
  .val { fill: none; stroke: #e0701a; stroke-width: 1.5 } circle.val { fill: #e0701a }
  @media (prefers-color-scheme: dark) { svg { background: #0d1117; color: #e6edf3 } }
"""
FRAME = str.maketrans("┌┐└┘─│", "++++-|")
Points = list[tuple[float, float]]


@dataclass
class LossCurves:
    """(step, loss in nats per token) of training and of the evaluations, in the steps' order."""

    train: Points = field(default_factory=list)
    val: Points = field(default_factory=list)

    @classmethod
    def of(cls, log: Iterable[dict[str, Any]]) -> LossCurves:
        """Out of the lines of a log.jsonl."""
        curves = cls()
        for line in log:
            for tag, points in (("train/loss", curves.train), ("val/loss", curves.val)):
                if math.isfinite(line.get(tag, math.nan)):  # no curve goes through nan or inf
                    points.append((line["step"], line[tag]))
        return curves

    @property
    def can_be_drawn(self) -> bool:
        return len({step for step, _ in self.train + self.val}) > 1

    def plot(self, columns: int, encoding: str) -> str:
        """At most so many columns wide, NARROWEST or more; ASCII where the encoding has no more."""
        from uniplot import plot_to_string  # late: most runs go where no plot is wanted

        simple = not encodes("│─●·", encoding)
        series = [
            (self.val, "validation", "O" if simple else "●"),
            (thinned(self.train, 2 * columns), "train", "." if simple else "·"),
        ]
        shown = [one for one in reversed(series) if one[0]]
        text = plot_to_string(
            xs=[[step for step, _ in points] for points, _, _ in shown],
            ys=[[loss for _, loss in points] for points, _, _ in shown],
            lines=[name == "train" for _, name, _ in shown],
            legend_labels=[name for _, name, _ in shown],
            character_set="ascii",
            force_ascii_characters=[mark for _, _, mark in shown],
            title="loss in nats per token, by step",
            color=False,
            width=min(columns, 100) - 10,
            height=12,
            x_gridlines=[],
            y_gridlines=[],
        )
        return text.translate(FRAME) if simple else text

    def write(self, folder: Path) -> None:
        """Writes loss.svg, over the one of a run's earlier part."""
        content = self.svg()
        write_whole(folder / CURVE, lambda part: part.write_text(content, encoding="utf-8"))

    def svg(self) -> str:
        """Readable on a light and on a dark page."""
        steps, losses = zip(*(self.train + self.val), strict=True)
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        x = Scale(min(steps), max(steps), LEFT, right)
        y = Scale(min(losses), max(losses), bottom, TOP)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
            f"<style>{STYLE}</style>",
            *(
                tick(f"M{x.at(n):.1f} {TOP}V{bottom}", x.at(n), bottom + 18, "middle", f"{n:,.9g}")
                for n in x.ticks()
            ),
            *(
                tick(f"M{LEFT} {y.at(n):.1f}H{right}", LEFT - 8, y.at(n) + 4, "end", f"{n:g}")
                for n in y.ticks()
            ),
            f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>',
            f'<text transform="rotate(-90)" x="{-HEIGHT / 2}" y="16" text-anchor="middle">'
            "loss (nats per token)</text>",
        ]
        for name, points in (("train", thinned(self.train, MOST_POINTS)), ("val", self.val)):
            places = [f"{x.at(step):.1f},{y.at(loss):.1f}" for step, loss in points]
            parts.append(f'<polyline class="{name}" points="{" ".join(places)}"/>')
        for step, loss in self.val:
            title = f"<title>step {step:,}: {loss:.4f}</title>"
            place = f'cx="{x.at(step):.1f}" cy="{y.at(loss):.1f}"'
            parts.append(f'<circle class="val" {place} r="3.5">{title}</circle>')
        for left, name, said in ((LEFT, "train", "training"), (LEFT + 120, "val", "validation")):
            parts.append(f'<path class="{name}" d="M{left} 20h24"/>')
            parts.append(f'<text x="{left + 30}" y="24">{said}</text>')
        return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class Scale:
    """Numbers low to high, laid out from one pixel to another."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        span = self.high - self.low
        return self.first + (self.last - self.first) * ((value - self.low) / span if span else 0.5)

    def ticks(self) -> list[float]:
        """Four to ten round numbers."""
        span = self.high - self.low or abs(self.high) or 1.0
        unit = 10.0 ** math.floor(math.log10(span / 4))
        unit *= max(factor for factor in (1, 2, 5) if factor * unit <= span / 4)
        first, last = math.ceil(self.low / unit), math.floor(self.high / unit)
        return [round(number * unit, 12) for number in range(first, last + 1)]


def tick(line: str, x: float, y: float, anchor: str, label: str) -> str:
    """A line across the picture, and the number beside it."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<path class="grid" d="{line}"/><text {place}>{label}</text>'


def thinned(points: Points, most: int) -> Points:
    """At most so many points: means of neighbours."""
    group = math.ceil(len(points) / most)
    groups = [points[start : start + group] for start in range(0, len(points), group or 1)]
    return [
        (sum(step for step, _ in one) / len(one), sum(loss for _, loss in one) / len(one))
        for one in groups
    ]
