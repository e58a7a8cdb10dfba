"""Steps 23 to 25: when gradients are summed, and who holds which bytes of a layer."""

from __future__ import annotations

from pictures.canvas import WIDTH, Box, Canvas
from pictures.flow import MARGIN, Gate, Tensor, Way, ways_with_room
from pictures.grids import blank, blank_partial

UNIT, LEFT = 20, MARGIN + 52
PASSES = [("F", 0, 2), *(("B", n, 1.5) for n in (3, 2, 1, 0))] * 2
"""Of two micro-batches: kind, bucket and length of what a rank computes, in turn."""


def summed_meanwhile() -> str:
    """Step 23: the sums of a step's last micro-batch, behind the backward pass and beside it."""
    canvas = Canvas(2 * MARGIN + 2 * 122 - 8)
    for panel, overlap in enumerate((False, True)):
        top, x, ready = MARGIN + panel * 122, 0.0, []
        for rank in range(2):
            y = top + rank * 74
            canvas.rect(Box(MARGIN, y, WIDTH - 2 * MARGIN, 36), f"l{rank}", 6)
            canvas.text(MARGIN + 6, y + 18, f"rank {rank}", "small faint", "start")
            x, ready = float(LEFT), []
            for kind, bucket, length in PASSES:
                box = Box(x, y + 6, length * UNIT * 0.92, 24)
                words = kind if kind == "F" else f"d{bucket}"
                canvas.cell(box, "w" if kind == "F" else f"r{rank}", words, small=True)
                x = box.right
                ready.append(x)
        free = ready[-1]
        starts = ready[-4:] if overlap else [free] * 4
        end = 0.0
        for bucket, start in zip((3, 2, 1, 0), starts, strict=True):
            gate = Box(max(start, end) + 1, top + 42, 25, 26)
            end = gate.right
            canvas.rect(gate, "gate", 5)
            canvas.text(gate.cx, gate.cy, f"Σ{bucket}", "on small")
    return canvas.svg()


def slices_of_moments() -> str:
    """Step 24: W before, during and after a step; below, what a rank of four holds."""
    slices, whole = blank((4, 4), 0), blank((4, 4), None)
    forward = [
        Tensor("W", "V", slices),
        Gate("all-gather"),
        Tensor("W", "R", whole),
        Tensor("y", "V", blank((4, 2), 0)),
    ]
    backward = [
        Tensor("m, v, dW", "V", slices),
        Gate("reduce-scatter"),
        Tensor("dW", "P", blank_partial((4, 4))),
        Tensor("dy", "V", blank((4, 2), 0)),
    ]
    return with_levels((forward, backward), [0, 1])


def whole_for_a_while() -> str:
    """Step 25: W before, during and after a layer, forward and backward; below, the levels."""
    slices, whole = blank((4, 4), 0), blank((4, 4), None)
    forward = [
        Tensor("W", "V", slices),
        Gate("all-gather"),
        Tensor("W", "R", whole),
        Tensor("y", "V", blank((4, 2), 0)),
        Gate(""),
        Tensor("W", "V", slices),
    ]
    backward = [
        Tensor("W, dW", "V", slices),
        Gate("reduce-scatter"),
        Tensor("dW", "P", blank_partial((4, 4))),
        Tensor("W", "R", whole),
        Gate("all-gather"),
        Tensor("W", "V", slices),
    ]
    return with_levels((forward, backward), [0, 1, 2, 3])


ALL, SLICE = 96, 24
"""Units of a bar: what is whole on a rank, and a quarter of it, a rank's slice or a block."""

TWO_BLOCKS, TWO_GRADIENTS = [("w", SLICE, "")] * 2, [("p0", SLICE, "")] * 2
OWN_MOMENTS = [("r0", SLICE, "m"), ("r0", SLICE, "v")]
HELD = [  # at each level: slices in a color, what is whole in grey, unsummed gradients striped
    [("w", ALL, "W"), ("p0", ALL, "dW"), ("w", ALL, "m"), ("w", ALL, "v")],
    [("r0", SLICE, "W"), ("w", ALL, "W"), ("p0", ALL, "dW"), *OWN_MOMENTS],
    [("r0", SLICE, "W"), ("w", ALL, "W"), ("r0", SLICE, "dW"), *TWO_GRADIENTS, *OWN_MOMENTS],
    [("r0", SLICE, "W"), *TWO_BLOCKS, ("r0", SLICE, "dW"), *TWO_GRADIENTS, *OWN_MOMENTS],
]


def with_levels(way: Way, levels: list[int]) -> str:
    """The way of a weight, and under it what one rank of four holds at these levels."""
    canvas, bottom = ways_with_room(30 + 32 * len(levels), way)
    for row, level in enumerate(levels):
        x, y = MARGIN + 54.0, bottom + 24 + row * 32
        canvas.text(MARGIN + 6, y + 12, f"zero {level}", "small", "start")
        for kind, width, words in HELD[level]:
            box = canvas.cell(Box(x, y, width, 24), kind, words, small=True)
            x = box.right
    return canvas.svg()
