"""Curves of runs, from the numbers that steps/plots.py measured and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pictures.canvas import WIDTH, Box, Canvas

LEFT, RIGHT = 52, 16
TWO = ("c0 under", "c1 over")  # broad and pale, and thin on top of it: both are seen


class Panel:
    """Axes: steps to the right, and a loss or the decimal logarithm of a difference upward."""

    def __init__(self, canvas: Canvas, box: Box, steps: int, low: float, high: float) -> None:
        self.canvas, self.box, self.steps = canvas, box, steps
        self.low, self.high = low, high
        canvas.rect(box, "frame")

    def x(self, step: float) -> float:
        return self.box.x + self.box.w * step / self.steps

    def y(self, value: float) -> float:
        return self.box.bottom - self.box.h * (value - self.low) / (self.high - self.low)

    def tick(self, value: float, words: str) -> None:
        self.canvas.text(self.box.x - 6, self.y(value), words, "small", "end")
        ends = [(self.box.x, self.y(value)), (self.box.right, self.y(value))]
        self.canvas.line(*ends, kind="grid", head=False)

    def level(self, value: float, words: str, told_at: float) -> None:
        """A dashed line across, with what it is at its right end, at a height where no curve is."""
        y = self.y(value)
        self.canvas.line((self.box.x, y), (self.box.right, y), kind="thin", head=False)
        self.canvas.text(self.box.right - 6, self.y(told_at), words, "small", "end")

    def curve(self, values: Sequence[float], kind: str) -> None:
        """One value a step; the first one is step 1."""
        points = [
            (round(self.x(n), 1), round(self.y(min(max(v, self.low), self.high)), 1))
            for n, v in enumerate(values, 1)
        ]
        self.canvas.line(*points, kind=kind, head=False)

    def dots(self, values: Sequence[float], kind: str) -> None:
        """One value a step, not joined; each dot is a line of no length with round ends."""
        there = [
            f"M{self.x(n):.1f} {self.y(min(max(v, self.low), self.high)):.1f}h0"
            for n, v in enumerate(values, 1)
        ]
        self.canvas.parts.append(f'<path class="{kind} dots" d="{"".join(there)}"/>')

    def axis(self) -> None:
        for step in range(0, self.steps + 1, self.steps // 4):
            self.canvas.text(self.x(step), self.box.bottom + 12, str(step), "small")


def legend(
    canvas: Canvas, x: float, y: float, names: Sequence[str], kinds: Sequence[str] = ("c0", "c1")
) -> None:
    for n, name in enumerate(names):
        here = y + n * 18
        canvas.line((x, here), (x + 22, here), kind=kinds[n], head=False)
        canvas.text(x + 28, here, name, "small", "start")


def kept(step: Path, name: str = "plot.json") -> tuple[float, dict[str, list[float]]]:
    numbers = json.loads((step / name).read_text())
    return numbers["floor"], numbers["losses"]


def with_floor(step: Path) -> str:
    """Step 02: two losses, the start and the floor; one of them goes under it."""
    floor, losses = kept(step)
    letters = 8
    steps = len(next(iter(losses.values())))
    canvas = Canvas(270)
    panel = Panel(canvas, Box(LEFT, 14, WIDTH - LEFT - RIGHT, 226), steps, 0, 2.25)
    for value in (0, 1, 2):
        panel.tick(value, str(value))
    panel.level(math.log(letters), f"ln V {math.log(letters):.4f}", told_at=2.17)
    panel.level(floor, f"floor {floor:.4f}", told_at=1.1)
    for n, values in enumerate(losses.values()):
        panel.curve(values, f"c{n}")
    legend(canvas, 300, panel.y(0.75), list(losses))
    panel.axis()
    return canvas.svg()


def parted(step: Path, pairs: dict[str, tuple[str, str]], low: int) -> str:
    """The losses above; below, by how much the two of each pair differ, on a logarithmic axis.

    Above is the second run of each pair, or both runs of an only pair.
    """
    _, losses = kept(step)
    steps = len(next(iter(losses.values())))
    canvas = Canvas(364)
    above = Panel(canvas, Box(LEFT, 14, WIDTH - LEFT - RIGHT, 110), steps, 1.2, 2.2)
    for value in (1.5, 2.0):
        above.tick(value, str(value))
    below = Panel(canvas, Box(LEFT, 146, WIDTH - LEFT - RIGHT, 186), steps, low, 0)
    for power in range(low + 2, 0, 2 if low > -10 else 4):
        below.tick(power, f"1e{power}")
    only = len(pairs) == 1
    shown = next(iter(pairs.values())) if only else [second for _, second in pairs.values()]
    for kind, run in zip(TWO, shown, strict=True):
        above.curve(losses[run], kind)
    for n, (first, second) in enumerate(pairs.values()):
        gaps = [abs(a - b) for a, b in zip(losses[first], losses[second], strict=True)]
        below.dots([math.log10(gap) if gap else low for gap in gaps], "line" if only else f"c{n}")
    canvas.text(LEFT - 6, below.box.bottom, "0", "small", "end")
    names = [run.split()[-1] for run in shown] if only else list(pairs)
    legend(canvas, 330, above.y(2.0) + 14, names, TWO)
    below.axis()
    return canvas.svg()


def with_and_without_f(step: Path) -> str:
    """Step 04: two ranks against one, with `f` and without, in the model of step 05."""
    return parted(step, {"f on": ("1", "f on"), "f off": ("1", "f off")}, -8)


def with_the_bias_twice(step: Path) -> str:
    """Step 06: two ranks against one, with b after the sum and before it, in step 07's model."""
    return parted(step, {"b × 1": ("1", "b × 1"), "b × 2": ("1", "b × 2")}, -8)


def run_against_run(step: Path) -> str:
    """Two ranks against one, or against two of an earlier step, in each dtype that was measured."""
    runs = list(kept(step)[1])
    pairs = {first.split()[0]: (first, runs[n + 1]) for n, first in enumerate(runs) if n % 2 == 0}
    return parted(step, pairs, -17 if "float64" in pairs else -8)


def rounded(step: Path) -> str:
    """Step 17: fp32 and bf16, each against fp64."""
    pairs = {dtype: ("float64", dtype) for dtype in ("float32", "bfloat16")}
    return parted(step, pairs, -9)


def two_codes(step: Path) -> str:
    """A pair: the losses of the step's code (A) and of code that looks right (B), and the floor."""
    floor, losses = kept(step, "pair.json")
    steps = len(losses["A"])
    canvas = Canvas(214)
    low = 0.5 if min(losses["B"]) < 1 else 1.0
    panel = Panel(canvas, Box(LEFT, 14, WIDTH - LEFT - RIGHT, 170), steps, low, 2.2)
    for value in sorted({low, 1.0, 1.5, 2.0}):
        panel.tick(value, str(value))
    panel.level(floor, f"floor {floor:.4f}", told_at=1.1)
    for kind, values in zip(TWO, losses.values(), strict=True):
        panel.curve(values, kind)
    legend(canvas, 330, panel.y(2.0) + 14, list(losses), TWO)
    panel.axis()
    return canvas.svg()
