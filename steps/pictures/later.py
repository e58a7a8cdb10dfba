"""Steps 15 to 20: tokens, recomputation, short numbers, files, overlap, chunks."""

from __future__ import annotations

from pictures.attention import columns_of, heads, pieces
from pictures.canvas import WIDTH, Box, Canvas
from pictures.flow import MARGIN, Column, Gate, Tensor, draw_both, rows_with_room, ways_with_room
from pictures.grids import Grid, cut, partial, plus, whole
from pictures.values import found, whole_number


def sequence_parallel() -> str:
    """Step 15: outside the cut layers a rank has half of the tokens, inside half of the heads."""
    width, count = (whole_number("15", "config.py", name) for name in ("d_model", "n_heads"))
    tokens = whole_number("15", "config.py", "context_length")
    own = [f"0:{tokens // 2}", f"{tokens // 2}:{tokens}"]
    x, dy = [[2], [0], [1], [3]], [[1], [0], [2], [1]]  # (T, 1)
    terms = [[[1], [2], [3], [4]], [[5], [6], [7], [8]]]
    gradients = [[[3], [0], [2], [1]], [[0], [4], [1], [1]]]
    inside = [
        Tensor("q k v", "", pieces("qkv", 60, [0, 1] * 3, width // 2)),
        Tensor("", "V", heads(count, split=True)),
        Tensor("dense", "", columns_of(width)),
    ]
    return draw_both(
        [
            Tensor("x", "V", cut(x, 0), own),
            Gate("all-gather", "f"),
            Tensor("x", "R", whole(x)),
            *inside,
            Tensor("y", "P", partial(terms)),
            Gate("reduce-scatter", "g"),
            Tensor("y", "V", cut(plus(*terms), 0), own),
        ],
        [
            Tensor("dx", "V", cut(plus(*gradients), 0), own),
            Gate("reduce-scatter", "f"),
            Tensor("dx", "P", partial(gradients)),
            *inside,
            Tensor("dy", "R", whole(dy)),
            Gate("all-gather", "g"),
            Tensor("dy", "V", cut(dy, 0), own),
        ],
    )


def recomputed() -> str:
    """Step 16: MiB kept over time, in four layers, once as it was and once with recompute block."""
    measured = [
        float(found("16", "README.md", rf"^ +0\.0 +{mode} .* ([\d.]+) MiB$"))
        for mode in ("none", "block")
    ]
    layers = 4
    each = 2.0  # MiB of a block's input: 16 x 256 x 128 numbers of four bytes
    outside = measured[1] - layers * each
    inside = (measured[0] - outside) / layers
    forward = [outside * n / layers + inside * n for n in range(1, layers + 1)]
    plain = [(f"F{n}", forward[n - 1], "r0") for n in range(1, layers + 1)]
    plain += [(f"B{n}", forward[n - 1], "r1") for n in range(layers, 0, -1)]
    short = [outside * n / layers + each * n for n in range(1, layers + 1)]
    again = [(f"F{n}", short[n - 1], "r0") for n in range(1, layers + 1)]
    for n in range(layers, 0, -1):
        top = short[n - 1] + inside - each
        again += [(f"R{n}", top, "r2"), (f"B{n}", top, "r1")]
    canvas = Canvas(256)
    scale = 110 / max(forward)
    for panel, (name, bars) in enumerate((("none", plain), ("block", again))):
        ground = 140 + panel * 90
        canvas.text(24, ground - (60 if panel else 122), name, "bold", "start")
        for place, (step, mib, kind) in enumerate(bars):
            x = 24 + place * 36
            canvas.cell(Box(x, ground - mib * scale, 34, mib * scale), kind)
            canvas.text(x + 17, ground + 12, step, "small")
            if step == f"F{layers}":  # what the page measured
                told = (x + 34, ground - mib * scale - 10)
                canvas.text(*told, f"{measured[panel]:.1f} MiB", "small", "end")
    return canvas.svg()


def mixed_precision() -> str:
    """Step 17: the bits of a number, and which kind travels where in the feed-forward half."""
    size = 13.4
    both = [Grid([[f"r{r}"]] * 2, [["fp32"], ["bf16"]], WORD) for r in range(2)]
    bf16 = [Grid([[f"p{r}"]], [["bf16"]], WORD) for r in range(2)]
    canvas, bottom = ways_with_room(
        118,
        (
            [
                Tensor("x", "I", word("fp32")),
                Tensor("norm", "", word("fp32")),
                Tensor("", "I", word("bf16")),
                Gate("", "f"),
                Tensor("", "R", word("bf16")),
                Tensor("W", "", both),
                Tensor("y", "P", bf16),
                Gate("all-reduce", "g"),
                Tensor("y", "I", word("bf16")),
                Tensor("x + y", "", word("fp32")),
            ],
            [
                Tensor("dx", "I", word("fp32")),
                Tensor("norm", "", word("fp32")),
                Tensor("", "I", word("bf16")),
                Gate("all-reduce", "f"),
                Tensor("", "P", bf16),
                Tensor("dW", "", both),
                Tensor("dy", "R", word("bf16")),
                Gate("", "g"),
                Tensor("dy", "I", word("bf16")),
                Tensor("dx", "", word("fp32")),
            ],
        ),
    )
    for row, (name, exponent, fraction) in enumerate((("fp32", 8, 23), ("bf16", 8, 7))):
        y = bottom + 26 + row * 46
        kinds = [["r2"] + ["r3"] * exponent + ["w"] * fraction]
        box = canvas.grid(26, y + 12, kinds, None, (size, 18))
        canvas.text(26, y + 1, name, "bold small", "start")
        canvas.text(26 + size * (1 + exponent / 2), y + 1, str(exponent), "small")
        canvas.text(26 + size * (1 + exponent + fraction / 2), y + 1, str(fraction), "small")
        assert box.right < WIDTH
    return canvas.svg()


WORD = (36, 22)  # the size of a cell that names a dtype


def word(kind: str) -> list[Grid]:
    return [Grid([["w"]], [[kind]], WORD)] * 2


def overlap() -> str:
    """Step 19: a layer's backward pass on two ranks, in the page's milliseconds."""
    ms = {
        name: float(found("19", "README.md", rf"^ +{name} +([\d.]+) ms"))
        for name in ("product", "all-reduce", "all-gather", "reduce-scatter")
    }
    product, whole_sum = ms["product"], ms["all-reduce"]
    panels = [
        ([("dX", 0), ("dW", product)], [("all-reduce", 2 * product)]),
        ([("dX", 0), ("dW", product)], [("all-reduce", product)]),
        ([("dX", 0), ("dW", product)], [("all-gather", 0), ("reduce-scatter", product)]),
    ]
    x0 = MARGIN + 52
    scale = (WIDTH - x0 - MARGIN - 8) / (2 * product + whole_sum)
    canvas = Canvas(3 * 122 - 4)
    for panel, (products, sums) in enumerate(panels):
        top = MARGIN + panel * 122
        for rank in range(2):
            y = top + rank * 66
            canvas.rect(Box(MARGIN, y, WIDTH - 2 * MARGIN, 40), f"l{rank}", 6)
            canvas.text(MARGIN + 6, y + 20, f"rank {rank}", "small faint", "start")
            for name, start in products:
                box = Box(x0 + start * scale, y + 8, product * scale, 24)
                canvas.cell(box, f"r{rank}", name)
        for name, start in sums:
            box = Box(x0 + start * scale, top + 36, ms[name] * scale, 34)
            canvas.rect(box, "gate", 5)
            canvas.text(box.cx, box.cy, name, "on small")
    return canvas.svg()


def chunks() -> str:
    """Step 20: C tokens at a time from X to their rows of dX; dW is a sum over the chunks."""
    file = "README.md"
    totals = [
        int(found("20", file, rf"333 at a time: bytes at the peak {{.*'{name}': (\d+)"))
        for name in ("whole", "in chunks")
    ]

    def chunk(n: int) -> list[Column]:
        rows = [["r0" if i // 2 == n else "n"] * 2 for i in range(6)]
        done = [["p0" if i // 2 <= n else "n"] * 2 for i in range(6)]
        z = Grid([["r0"] * 6] * 2, None, (13, 12))
        return [
            Tensor(f"X{n + 1}", "", [Grid(rows, None, (13, 12))]),
            Tensor("W", "", [Grid([["r0"] * 2] * 6, None, (13, 12))]),
            Tensor(f"Z{n + 1}", "", [z]),
            Gate("all-reduce × 2"),
            Tensor(f"G{n + 1}", "", [z]),
            Tensor("dX", "P", [Grid(done, None, (13, 12))]),
            Tensor("dW", "", [Grid([["r0"] * 2] * 6, None, (13, 12))]),
        ]

    canvas, bottom = rows_with_room(96, chunk(0), chunk(1))
    for row, (kind, number) in enumerate(zip(("w", "r0"), totals, strict=True)):
        y = bottom + 22 + row * 38
        length = 300 * number / max(totals)
        canvas.rect(Box(MARGIN + 8, y, length, 26), f"{kind} cell")
        canvas.text(MARGIN + 16 + length, y + 13, f"{number / 1e6:.1f} MB", "", "start")
    return canvas.svg()


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
