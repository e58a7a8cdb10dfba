"""What the ranks hold, column by column: forward from left to right, backward under it.

A rank is a lane. A collective is one dark shape over all lanes; where a region function does
nothing in this direction, or takes a slice without communication, it is only outlined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pictures.canvas import WIDTH, Box, Canvas
from pictures.grids import Grid

MARGIN, LABEL, PAD, NOTE = 10, 24, 8, 16
GATE = 26  # the width of a collective


def width_of(name: str) -> int:
    """Of a short name above a grid; m and W are the widest of letters."""
    return sum(13 if letter in "mW" else 8 for letter in name)


@dataclass(frozen=True)
class Tensor:
    """A column: the name and the letter (R, I, V, P) of a tensor, and what each rank has of it."""

    name: str
    letter: str
    parts: list[Grid]
    notes: Sequence[str] = ()  # a short text for each rank, under the grid

    @property
    def w(self) -> float:
        """Of the widest part; the letter needs room too."""
        return max(*(part.w for part in self.parts), width_of(self.name) + 22 if self.letter else 0)

    @property
    def h(self) -> float:
        return max(part.h for part in self.parts) + (2 * NOTE if self.notes else 0)


@dataclass(frozen=True)
class Pair:
    """A column in which each rank has two tensors, one above the other."""

    upper: Tensor
    lower: Tensor

    @property
    def w(self) -> float:
        return max(self.upper.w, self.lower.w)

    @property
    def h(self) -> float:
        return self.upper.h + self.lower.h + LABEL + PAD


@dataclass(frozen=True)
class Gate:
    """A column: a collective, or a region function that communicates nothing this way."""

    name: str  # of the collective; empty if there is none
    region: str = ""  # f, g
    w: float = GATE
    h: float = 0


Column = Tensor | Pair | Gate


def places(*passes: Sequence[Column | None]) -> list[float]:
    """The left edge of each column, of the passes that share them; the gaps are equal."""
    columns = zip(*passes, strict=True)
    widths = [max(column.w for column in shared if column) for shared in columns]
    gap = (WIDTH - 2 * MARGIN - 2 * PAD - sum(widths)) / (len(widths) - 1)
    edges, x = [], float(MARGIN + PAD)
    for width in widths:
        edges.append(x)
        x += width + gap
    return edges


def lane_height(columns: Sequence[Column | None]) -> float:
    """Room for the highest column, and at the left end for the rank's name above the label."""
    first = columns[0].h + (26 if isinstance(columns[0], Pair) else 16) if columns[0] else 0
    return max(first, *(column.h for column in columns if column)) + LABEL + 2 * PAD


def lanes(canvas: Canvas, top: float, height: float, ranks: int = 2) -> list[Box]:
    boxes = []
    for rank in range(ranks):
        box = Box(MARGIN, top + rank * (height + 4), WIDTH - 2 * MARGIN, height)
        boxes.append(canvas.rect(box, f"l{rank}", 6))
        canvas.text(box.x + 6, box.y + 10, f"rank {rank}", "small faint", "start")
    return boxes


def draw_gate(canvas: Canvas, gate: Gate, box: Box) -> None:
    if not gate.name:
        canvas.rect(box, "open", 6)
        canvas.text(box.cx, box.cy, gate.region, "faint")
        return
    canvas.rect(box, "gate", 6)
    canvas.upright(box.cx, box.cy, gate.name, "on")
    if gate.region:
        canvas.text(box.cx, box.y + 14, gate.region, "on bold")


def draw_pass(
    canvas: Canvas, top: float, way: Sequence[Column | None], edges: list[float], leftwards: bool
) -> float:
    """One direction, all ranks; returns where it ends. None leaves a column empty."""
    boxes = lanes(canvas, top, lane_height(way), ranks_of(way))
    edges = [x for column, x in zip(way, edges, strict=True) if column]
    columns = [column for column in way if column]
    for rank, lane in enumerate(boxes):
        placed = [
            place(canvas, column, x, lane, rank) for column, x in zip(columns, edges, strict=True)
        ]
        for before, after in pairwise(placed):
            for number in range(max(len(before), len(after))):
                start, end = (
                    before[min(number, len(before) - 1)],
                    after[min(number, len(after) - 1)],
                )
                y0 = start.cy if start.h else end.cy
                y1 = end.cy if end.h else y0
                if len(before) > len(after) and end.h:  # into its upper and its lower half
                    y1 = min(max(y0, end.y + 6), end.bottom - 6)
                if len(before) < len(after) and start.h:
                    y0 = min(max(y1, start.y + 6), start.bottom - 6)
                ends = [(start.right + 2, y0), (end.x - 2, y1)]
                canvas.line(*(reversed(ends) if leftwards else ends))
    bottom = boxes[-1].bottom
    for column, x in zip(columns, edges, strict=True):
        if isinstance(column, Gate):
            draw_gate(canvas, column, Box(x, top + 4, column.w, bottom - top - 8))
    return bottom


def ranks_of(columns: Sequence[Column | None]) -> int:
    return max(len(column.parts) for column in columns if isinstance(column, Tensor))


def place(canvas: Canvas, column: Column, x: float, lane: Box, rank: int) -> list[Box]:
    """Draws what a rank has of a column; a box of no height stands for a collective."""
    middle = lane.y + LABEL + (lane.h - LABEL) / 2
    if isinstance(column, Gate):
        return [Box(x, middle, column.w, 0)]
    if isinstance(column, Pair):
        apart = (column.h - LABEL) / 4 + LABEL / 2
        upper = tensor_at(canvas, column.upper, x + column.w / 2, middle - apart, rank)
        return [upper, tensor_at(canvas, column.lower, x + column.w / 2, middle + apart, rank)]
    return [tensor_at(canvas, column, x + column.w / 2, middle, rank)]


def tensor_at(canvas: Canvas, tensor: Tensor, cx: float, cy: float, rank: int) -> Box:
    part = tensor.parts[rank]
    box = canvas.grid(
        cx - part.w / 2, cy - part.h / 2, part.kinds, part.entries, part.size, part.small
    )
    label(canvas, tensor, box)
    if tensor.notes:
        canvas.text(box.cx, box.bottom + 9, tensor.notes[rank], "small")
    return box


def label(canvas: Canvas, tensor: Tensor, box: Box) -> None:
    """The name above the grid, the letter beside it."""
    y = box.y - 13
    if not tensor.letter:
        canvas.text(box.cx, y, tensor.name)
        return
    canvas.text(box.cx - 11, y, tensor.name)
    canvas.badge(box.cx + width_of(tensor.name) / 2 + 1, y, tensor.letter)


Way = tuple[Sequence[Column], Sequence[Column | None]]
"""A forward pass, and column for column under it the backward pass."""


def draw_both(forward: Sequence[Column], backward: Sequence[Column | None]) -> str:
    """The SVG of both passes."""
    return draw_ways((forward, backward))


def draw_ways(*ways: Way) -> str:
    """The SVG of several parts of a model, each with its backward pass under it."""
    return ways_with_room(0, *ways)[0].svg()


def ways_with_room(room: float, *ways: Way) -> tuple[Canvas, float]:
    """The canvas of such parts, with room under it, and where the room begins."""
    passes = [columns for way in ways for columns in way]
    canvas = Canvas(2 * MARGIN + sum(map(height_of, passes)) + 24 * (len(passes) - 1) + room)
    top: float = MARGIN
    for way in ways:
        for columns in way:
            top = draw_pass(canvas, top, columns, places(*way), columns is way[1]) + 24
    return canvas, top - 24


def rows_with_room(room: float, *rows: Sequence[Column]) -> tuple[Canvas, float]:
    """The canvas of forward passes under each other, with room under them, and where it begins."""
    canvas = Canvas(2 * MARGIN + sum(map(height_of, rows)) + 24 * (len(rows) - 1) + room)
    top: float = MARGIN
    for columns in rows:
        top = draw_pass(canvas, top, columns, places(columns), leftwards=False) + 24
    return canvas, top - 24


def height_of(columns: Sequence[Column | None]) -> float:
    return ranks_of(columns) * (lane_height(columns) + 4) - 4
