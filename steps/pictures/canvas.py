"""A picture as plain SVG: rectangles, lines, short texts, grids; light and dark in one file.

A picture is 480 units wide and shown at up to 560 pixels; at 390 pixels a letter of 14 units is
still 10 pixels high. Colors are classes: w whole, r0 to r3 a rank's slice, p0 to p3 its partial
sum, n what it does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, SHOWN = 480, 560
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#59636e",
    "w": "#dfe3e8",
    "r0": "#a9cdff",
    "r1": "#ffc48f",
    "r2": "#a4e3ae",
    "r3": "#dcc2fa",
    "l0": "#f1f6ff",
    "l1": "#fff5ec",
    "l2": "#eefaf0",
    "l3": "#f8f2ff",
    "red": "#cf222e",
    "blue": "#0969da",
    "brown": "#bc4c00",
}
DARK = {
    "paper": "#0d1117",
    "ink": "#f0f6fc",
    "faint": "#9198a1",
    "w": "#3d444d",
    "r0": "#1c5bb0",
    "r1": "#9a5210",
    "r2": "#1d7a38",
    "r3": "#6f44a8",
    "l0": "#111c2f",
    "l1": "#261a0f",
    "l2": "#10241a",
    "l3": "#1f162e",
    "red": "#ff7b72",
    "blue": "#58a6ff",
    "brown": "#ffa657",
}
RULES = """
text{font-family:-apple-system,'Segoe UI','Noto Sans',Helvetica,Arial,sans-serif}
text{font-size:14px;fill:var(--ink)}
.small{font-size:12px}.bold{font-weight:600}.faint{fill:var(--faint)}.on{fill:var(--paper)}
.paper{fill:var(--paper)}.box{fill:var(--paper);stroke:var(--ink);stroke-width:1.5}
.gate{fill:var(--ink)}.open{fill:none;stroke:var(--faint);stroke-width:1.5;stroke-dasharray:4 3}
.stripe{fill:var(--paper);opacity:.4}
.cell{stroke:var(--faint);stroke-width:.75}
.n{fill:none;stroke:var(--faint);stroke-width:.75;stroke-dasharray:2 2;opacity:.8}
.line{fill:none;stroke:var(--ink);stroke-width:1.5}
.thin{fill:none;stroke:var(--faint);stroke-width:1.2;stroke-dasharray:4 3}
.badline{fill:none;stroke:var(--red);stroke-width:2.5}
.head{fill:var(--ink)}.frame{fill:none;stroke:var(--faint)}.grid{fill:none;stroke:var(--w)}
.c0{fill:none;stroke:var(--blue);stroke-width:2}.c1{fill:none;stroke:var(--brown);stroke-width:2}
.under{stroke-width:6;stroke-linejoin:round;opacity:.45}.over{stroke-width:1.5}
.dots{stroke-width:3.5;stroke-linecap:round}
"""


def style() -> str:
    """Both schemes; the reader's setting chooses, and the paper goes with the ink."""
    light, dark = (
        ";".join(f"--{name}:{color}" for name, color in scheme.items()) for scheme in (LIGHT, DARK)
    )
    fills = "".join(f".{name}{{fill:var(--{name})}}" for name in LIGHT if name[-1:].isdigit())
    partial = "".join(f".p{rank}{{fill:url(#p{rank})}}" for rank in range(4))
    return (
        f"svg{{{light}}}\n@media (prefers-color-scheme:dark){{svg{{{dark}}}}}{RULES}"
        f".w{{fill:var(--w)}}{fills}{partial}\n"
    )


@dataclass(frozen=True)
class Box:
    """Where something lies: its upper left corner, its width and its height."""

    x: float
    y: float
    w: float
    h: float

    @property
    def cx(self) -> float:
        return self.x + self.w / 2

    @property
    def cy(self) -> float:
        return self.y + self.h / 2

    @property
    def right(self) -> float:
        return self.x + self.w

    @property
    def bottom(self) -> float:
        return self.y + self.h


class Canvas:
    def __init__(self, height: float, width: float = WIDTH) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def rect(self, box: Box, kind: str, radius: float = 0) -> Box:
        round_ = f' rx="{radius:g}"' if radius else ""
        size = f'width="{box.w:g}" height="{box.h:g}"'
        self.parts.append(f'<rect class="{kind}" x="{box.x:g}" y="{box.y:g}" {size}{round_}/>')
        return box

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        """Centered at height y; `anchor` says which end of the words lies at x."""
        kind = f' class="{kind}"' if kind else ""
        where = f'x="{x:g}" y="{y + 5:g}"'
        self.parts.append(f'<text{kind} {where} text-anchor="{anchor}">{escape(words)}</text>')

    def upright(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Centered at (x, y), read from below."""
        turned = f'transform="translate({x + 5:g} {y:g}) rotate(-90)" text-anchor="middle"'
        self.parts.append(f'<text class="{kind}" {turned}>{escape(words)}</text>')

    def line(self, *points: tuple[float, float], kind: str = "line", head: bool = True) -> None:
        """Through all points; the last of them is the arrow's tip."""
        (x0, y0), (x1, y1) = points[-2:]
        way = max(abs(x1 - x0), abs(y1 - y0)) or 1
        dx, dy = (x1 - x0) / way, (y1 - y0) / way
        drawn = [*points[:-1], (x1 - 5 * dx, y1 - 5 * dy)] if head else list(points)
        path = " ".join(f"{x:g},{y:g}" for x, y in drawn)
        self.parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if head:
            foot = [(x1 - 8 * dx + s * 4 * dy, y1 - 8 * dy - s * 4 * dx) for s in (1, -1)]
            tip = " ".join(f"{x:g},{y:g}" for x, y in [(x1, y1), *foot])
            self.parts.append(f'<polygon class="head" points="{tip}"/>')

    def badge(self, x: float, y: float, letter: str) -> None:
        """R, I, V or P in a circle."""
        self.parts.append(f'<circle class="box" cx="{x:g}" cy="{y:g}" r="8.5"/>')
        self.text(x, y - 0.5, letter, "small bold")

    def cell(self, box: Box, kind: str, words: str = "", small: bool = False) -> Box:
        if kind.startswith("p"):  # a pattern alone does not follow the scheme everywhere
            self.rect(box, f"r{kind[1]}")
        self.rect(box, kind if kind == "n" else f"{kind} cell")
        if words:
            self.text(box.cx, box.cy, words, "small" if small else "")
        return box

    def grid(
        self,
        x: float,
        y: float,
        kinds: Sequence[Sequence[str]],
        entries: Sequence[Sequence[object]] | None = None,
        size: tuple[float, float] = (22, 20),
        small: bool = False,
    ) -> Box:
        """A matrix with its upper left corner at (x, y): a color a cell, and what stands in it."""
        w, h = size
        for row, colors in enumerate(kinds):
            for column, kind in enumerate(colors):
                words = str(entries[row][column]) if entries and kind != "n" else ""
                self.cell(Box(x + column * w, y + row * h, w, h), kind, words, small)
        return Box(x, y, len(kinds[0]) * w, len(kinds) * h)

    def svg(self) -> str:
        stripes = "".join(
            f'<pattern id="p{rank}" width="7" height="7" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)">'
            f'<rect class="r{rank}" width="7" height="7"/>'
            '<rect class="stripe" width="2.5" height="7"/></pattern>'
            for rank in range(4)
        )
        shown = SHOWN * self.width / WIDTH
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{shown:g}" '
                f'height="{shown * self.height / self.width:.0f}" '
                f'viewBox="0 0 {self.width:g} {self.height:g}">',
                f"<style>{style()}</style><defs>{stripes}</defs>",
                f'<rect class="paper" width="{self.width:g}" height="{self.height:g}" rx="8"/>',
                *self.parts,
                "</svg>\n",
            ]
        )
