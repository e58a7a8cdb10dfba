"""Steps 00 to 03: ranks and a sum, the model, tokens and labels, rows for each rank."""

from __future__ import annotations

from pictures.canvas import WIDTH, Box, Canvas
from pictures.flow import MARGIN, Gate, Tensor, draw_both, lanes
from pictures.grids import Grid, blank, blank_partial, whole
from pictures.values import found, value, whole_number

TALL = 62  # a lane with one number


def two_ranks() -> str:
    """Step 00: an all-reduce, and under it what happens where rank 1 leaves it out."""
    first = float(found("00", "two_ranks.py", r"sum_over_ranks\(rank \+ ([\d.]+)\)"))
    held = [first, first + 1]
    seconds = f"{value('00', 'two_ranks.py', 'TIMEOUT'):g} s"
    canvas = Canvas(2 * MARGIN + 4 * TALL + 32)
    boxes = lanes(canvas, MARGIN, TALL)
    gate = Box(WIDTH / 2 - 75, MARGIN + 4, 150, 2 * TALL - 4)
    for lane, number in zip(boxes, held, strict=True):
        y = lane.cy + 4
        number_in(canvas, 90, y, number, f"r{boxes.index(lane)}")
        canvas.line((113, y), (gate.x - 3, y))
        canvas.line((gate.right + 3, y), (WIDTH - 113, y))
        number_in(canvas, WIDTH - 90, y, sum(held), "w")
    canvas.rect(gate, "gate", 8)
    canvas.text(gate.cx, gate.cy - 12, "all-reduce", "on bold")
    canvas.text(gate.cx, gate.cy + 12, f"{held[0]} + {held[1]} = {sum(held)}", "on")
    boxes = lanes(canvas, MARGIN + 2 * TALL + 28, TALL)
    top, other = (lane.cy + 4 for lane in boxes)
    half = Box(gate.x, boxes[0].y + 4, gate.w, TALL - 8)
    number_in(canvas, 90, top, held[0], "r0")
    canvas.line((113, top), (half.x - 3, top))
    canvas.rect(half, "gate", 8)
    canvas.text(half.cx, half.cy - 10, "all-reduce", "on bold")
    canvas.text(half.cx, half.cy + 10, f"{held[0]} + ?", "on")
    canvas.line((half.right + 3, top), (WIDTH - 113, top), kind="thin")
    canvas.text((half.right + WIDTH - 113) / 2 - 4, top - 12, seconds, "small")
    cross(canvas, WIDTH - 90, top)
    number_in(canvas, 90, other, held[1], "r1")
    canvas.line((113, other), (WIDTH - 113, other))
    canvas.rect(Box(gate.x, boxes[1].y + 4, gate.w, TALL - 8), "open", 8)
    return canvas.svg()


def number_in(canvas: Canvas, x: float, y: float, number: float, kind: str) -> None:
    canvas.cell(Box(x - 22, y - 13, 44, 26), kind, f"{number:.1f}")


def cross(canvas: Canvas, x: float, y: float) -> None:
    for slope in (1, -1):
        canvas.line((x - 9, y - 9 * slope), (x + 9, y + 9 * slope), kind="badline", head=False)


def minimal_gpt() -> str:
    """Step 01: every tensor of the model as a bar; its length is the width of a token's vector."""
    d, heads = (whole_number("01", "config.py", name) for name in ("d_model", "n_heads"))
    vocab = whole_number("01", "train.py", "vocab_size")
    tokens = len(found("01", "train.py", r'LINE = b"(.*)"')) - 1
    canvas = Canvas(400)
    left, per, step, x0 = 172, 0.75, 42, 150

    def bar(row: int, kind: str, name: str, widths: list[int], text: str) -> float:
        y = MARGIN + 18 + row * step
        x = float(left)
        for width in widths:
            canvas.cell(Box(x, y - 11, width * per, 22), kind)
            x += width * per
        canvas.text(x + 8, y, text, "", "start")
        canvas.text(x0 - 18, y, name, "small", "end")
        return y

    rows = [
        ("w", "input_ids", [], f"{tokens}"),
        ("r0", "token_embedding", [d], f"{tokens} × {d}"),
        ("w", "query_key_value", [d, d, d], f"{tokens} × {3 * d}"),
        ("w", "attention", [d // heads] * heads, f"{heads} × {tokens} × {d // heads}"),
        ("r0", "dense", [d], f"{tokens} × {d}"),
        ("w", "dense_h_to_4h", [4 * d], f"{tokens} × {4 * d}"),
        ("r0", "dense_4h_to_h", [d], f"{tokens} × {d}"),
        ("w", "output_head", [vocab], f"{tokens} × {vocab}"),
        ("w", "loss", [], "1"),
    ]
    ys = [bar(row, *what) for row, what in enumerate(rows)]
    canvas.line((x0, ys[0]), (x0, ys[-1] + 8), head=True)
    for y in (ys[4], ys[6]):  # the residual stream gains what attention and feed-forward add
        canvas.parts.append(f'<circle class="box" cx="{x0}" cy="{y:g}" r="9"/>')
        canvas.text(x0, y - 0.5, "+")
    for start, end in ((1, 4), (4, 6)):
        y0, y1 = ys[start] + 16, ys[end]
        canvas.line((x0, y0), (left - 6, y0), (left - 6, y1), (x0 + 10, y1), kind="thin")
    causal(canvas, ys[3])
    top, bottom = ys[2] - 14, ys[6] + 14
    canvas.line((28, top), (22, top), (22, bottom), (28, bottom), head=False)
    times = whole_number("01", "config.py", "n_layers")
    canvas.upright(8, (top + bottom) / 2, f"× {times}", "small")
    return canvas.svg()


def causal(canvas: Canvas, y: float) -> None:
    """Which tokens a token sees: a small triangle beside attention."""
    size, n = 9, 7
    kinds = [["w" if s <= t else "n" for s in range(n)] for t in range(n)]
    canvas.grid(WIDTH - MARGIN - n * size - 8, y - n * size / 2, kinds, None, (size, size))


def labels() -> str:
    """Step 02: the window, its inputs and its labels; under them a row with padding."""
    window, ids = (
        [int(digit) for digit in found("02", "test_forward.py", pattern)]
        for pattern in (r'\("(\d+)"', r', "(\d+)"\)')
    )
    canvas = Canvas(316)
    size, x0 = 46, 70
    rows = [("w", 0, window, "w"), ("x", 0, window[:-1], "r0"), ("y", 1, window[1:], "r1")]
    for row, (name, shift, tokens, kind) in enumerate(rows):
        y = 18 + row * 46
        canvas.text(x0 - 22, y + 13, name, "bold")
        for place, token in enumerate(tokens):
            canvas.cell(Box(x0 + (place + shift) * size, y, size, 26), kind, str(token))
    for place in range(len(window) - 1):
        x = x0 + place * size
        canvas.line((x + size * 0.6, 92), (x + size * 1.4, 108))
    masked = [0, 1, 1, 1, 1, 0, 0]
    real = [sum(masked[: t + 1]) for t in range(len(ids))]
    position = [max(0, n - 1) for n in real]
    target = [
        str(ids[t + 1]) if masked[t] and t + 1 < len(ids) and masked[t + 1] else "-"
        for t in range(len(ids))
    ]
    told = [("ids", ids), ("mask", masked), ("position", position), ("y", target)]
    for row, (name, entries) in enumerate(told):
        y = 186 + row * 32
        canvas.text(x0 + 14, y + 13, name, "small", "end")
        for place, entry in enumerate(entries):
            kind = ("r0" if row < 3 else "r1") if masked[place] and entry != "-" else "n"
            canvas.cell(Box(x0 + 24 + place * size, y, size, 26), kind, str(entry))
    return canvas.svg()


def data_parallel() -> str:
    """Step 03: each rank's rows, its share of the labels, and the sums of loss and gradients."""
    rows = found("03", "test_forward.py", r"ends = torch.tensor\(\[\[(.*?)\]\],").split("], [")
    ends, tokens = [int(row) for row in rows], 7
    half = len(ends) // 2
    batch = [
        Grid(
            [
                [f"r{rank}" if row // half == rank and t < end else "n" for t in range(tokens)]
                for row, end in enumerate(ends)
            ],
            None,
            (12, 12),
        )
        for rank in range(2)
    ]
    counts = [sum(ends[:half]), sum(ends[half:])]
    shares = [f"{n}/{sum(counts)}" for n in counts]
    weight, one = blank((4, 3), None), whole([[1]])
    return draw_both(
        [
            Tensor("x, y", "V", batch, [str(count) for count in counts]),
            Gate(f"all-reduce {counts[0]} + {counts[1]} = {sum(counts)}"),
            Tensor("W", "R", weight),
            Tensor("L", "P", blank_partial((1, 1), (22, 20)), shares),
            Gate("all-reduce"),
            Tensor("L", "I", blank((1, 1), None, (22, 20))),
        ],
        [
            Tensor("dW", "I", weight),
            Gate("all-reduce"),
            Tensor("dW", "P", blank_partial((4, 3)), shares),
            Tensor("dL", "R", one),
            Gate(""),
            Tensor("dL", "I", one),
        ],
    )
