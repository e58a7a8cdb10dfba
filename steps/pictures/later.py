"""Steps 15 to 20: tokens, recomputation, short numbers, files, overlap, chunks."""

from __future__ import annotations

from pictures.canvas import WIDTH, Box, Canvas
from pictures.values import whole_number

SCALE = 6.6  # units a column of W, in the picture of the files


def resharded() -> str:
    """Step 18: two ranks write slices of W and b, four read them; all lie above each other."""
    d = whole_number("18", "config.py", "d_model")
    canvas = Canvas(330)
    left = (WIDTH - d * SCALE) / 2
    heights = (22, 146, 262)

    def strip(y: float, ranks: int, tall: float, inset: float = 0) -> list[Box]:
        boxes = []
        for rank in range(ranks):
            start, stop = rank * d // ranks, (rank + 1) * d // ranks
            box = Box(left + start * SCALE + inset, y, (stop - start) * SCALE - 2 * inset, tall)
            boxes.append(box)
            canvas.rect(box, f"r{rank} cell", 4)
            words = f"W[:, {start}:{stop}]" if ranks == 2 else f"{start}:{stop}"
            canvas.text(box.cx - (14 if ranks == 4 else 0), y + tall / 2, words)
        return boxes

    def name(box: Box, y: float, words: str) -> None:
        canvas.text(box.cx, y, words, "small")

    above = strip(heights[0] + 8, 2, 34, 2)
    for rank, box in enumerate(above):
        name(box, 14, f"rank {rank}")
        b_chip(canvas, box.right - 16, box.cy, "w")
    for rank, box in enumerate(above):
        paper = Box(box.x, heights[1] - 32, box.w, 64)
        canvas.rect(paper, "box", 6)
        start, stop = rank * d // 2, (rank + 1) * d // 2
        slice_ = canvas.rect(Box(paper.x + 8, heights[1] - 2, paper.w - 48, 26), f"r{rank} cell", 3)
        canvas.text(slice_.cx, slice_.cy, f"W[:, {start}:{stop}]")
        name(paper, heights[1] - 19, f"rank_{rank:05d}.safetensors")
        canvas.line((paper.cx, box.bottom + 3), (paper.cx, paper.y - 3))
        if rank == 1:
            b_chip(canvas, paper.right - 20, slice_.cy, "w")
    below = strip(heights[2] + 8, 4, 34, 2)
    bus = heights[2] - 28
    for rank, box in enumerate(below):
        name(box, heights[2] + 56, f"rank {rank}")
        b_chip(canvas, box.right - 16, box.cy, "w")
        canvas.line((box.cx - 14, heights[1] + 34), (box.cx - 14, box.y - 3))
        if rank < 3:
            canvas.line((box.right - 16, bus), (box.right - 16, box.y - 3), kind="thin")
    source = (above[1].right - 20, heights[1] + 26)
    last = below[-1].right - 16
    canvas.line(source, (source[0], bus), (last, bus), (last, below[-1].y - 3), kind="thin")
    canvas.line((source[0], bus), (below[0].right - 16, bus), kind="thin", head=False)
    return canvas.svg()


def b_chip(canvas: Canvas, x: float, y: float, kind: str) -> None:
    """The bias, which every rank holds whole."""
    canvas.cell(Box(x - 11, y - 11, 22, 22), kind, "b")
