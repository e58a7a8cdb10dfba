"""Steps 11 to 14: ranks in rows and columns, a vocabulary that is cut, masks by coordinates."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

from pictures.canvas import Box, Canvas
from pictures.flow import MARGIN, Gate, Tensor, draw_both, draw_ways
from pictures.grids import Grid, blank, blank_partial, cut, whole
from pictures.values import found, whole_number


def mesh() -> str:
    """Step 11: ranks side by side share a model, ranks above each other its gradients' sum."""
    rows = whole_number("11", "train.py", "ROWS")
    canvas = Canvas(330)
    for tp in range(2):
        canvas.text(194 + tp * 220, 16, f"tp {tp}", "small")
    for dp in range(2):
        y = 30 + dp * 172
        canvas.text(37, y + 9, f"dp {dp}", "small")
        batch = canvas.grid(20, y + 20, [["w"] * 3] * (rows // 2), None, (11, 10))
        canvas.text(
            batch.cx, batch.bottom + 10, f"{dp * rows // 2}:{(dp + 1) * rows // 2}", "small"
        )
        for tp in range(2):
            rank = 2 * dp + tp
            box = canvas.rect(Box(84 + tp * 220, y, 166, 116), f"l{rank}", 8)
            canvas.text(box.x + 8, y + 11, f"rank {rank}", "small faint", "start")
            kinds = [[f"r{rank}" if column // 3 == tp else "n" for column in range(6)]] * 4
            weight = canvas.grid(box.x + 46, y + 42, kinds, None, (14, 14))
            canvas.text(weight.cx, y + 28, "W")
        gate = canvas.rect(Box(256, y + 4, 42, 108), "gate", 8)
        canvas.upright(gate.cx - 10, gate.cy, "all-reduce", "on")
        canvas.upright(gate.cx + 9, gate.cy, "f, g, norm²", "on small")
    for tp in range(2):
        gate = canvas.rect(Box(92 + tp * 220, 152, 150, 44), "gate", 8)
        canvas.text(gate.cx, gate.cy, "all-reduce dW", "on")
    return canvas.svg()


def vocabulary() -> str:
    """Step 12: a row of the table comes from the one rank that has it; the head is cut alike."""
    padded = whole_number("12", "vocab_parallel.py", "PADDED_TO")
    size, ids, pieces = 100, (5, 70), 4
    each = padded // pieces
    words = [[f"{n * each}:{min((n + 1) * each, size)}"] for n in range(pieces)]
    table = [
        Grid(
            [[f"r{rank}" if n // 2 == rank else "n"] for n in range(pieces)], words, (56, 17), True
        )
        for rank in range(2)
    ]
    rows = [f"W[{n}]" for n in ids]
    terms = [
        Grid(
            [[f"p{rank}"]] * 2,
            [[row if n == rank else "0"] for n, row in enumerate(rows)],
            (50, 20),
        )
        for rank in range(2)
    ]
    found_rows = Grid([["w"]] * 2, [[row] for row in rows], (50, 20))
    upstream = [replace(found_rows, entries=[["dx[0]"], ["dx[1]"]])] * 2
    gained = [
        replace(part, entries=[["", "dx[0]", "", "dx[1]"][n : n + 1] for n in (1, 0, 3, 2)])
        for part in table
    ]
    x, half = blank((2, 3), None), padded // 2
    part, whole_row = blank((2, 8), 1, (12, 12)), blank((2, 8), None, (12, 12))
    notes = [f"0:{half}", f"{half}:{size}"]
    return draw_ways(
        (
            [
                Tensor("ids", "I", whole([[n] for n in ids])),
                Tensor("W", "", table),
                Tensor("x", "P", terms),
                Gate("all-reduce", "g"),
                Tensor("x", "I", [found_rows] * 2),
            ],
            [
                None,
                Tensor("dW", "", gained),
                Tensor("dx", "R", upstream),
                Gate("", "g"),
                Tensor("dx", "I", upstream),
            ],
        ),
        (
            [
                Tensor("x", "I", x),
                Gate("", "f"),
                Tensor("x", "R", x),
                Tensor("W", "", table),
                Tensor("z", "V", part, notes),
                Gate("all-gather"),
                Tensor("z", "I", whole_row, [f"0:{size}"] * 2),
            ],
            [
                Tensor("dx", "I", x),
                Gate("all-reduce", "f"),
                Tensor("dx", "P", blank_partial((2, 3))),
                Tensor("W", "", table),
                Tensor("dz", "V", part, notes),
                Gate(""),
                Tensor("dz", "I", whole_row, [f"0:{size}"] * 2),
            ],
        ),
    )


def loss_of_slices() -> str:
    """Step 13: one token, eight logits, its label is 1; numbers travel, logits do not."""
    z, label = [1, 3, 0, 2, 4, 1, 2, 0], 1
    halves = [z[:4], z[4:]]
    tops = [max(half) for half in halves]
    top = max(tops)
    sums = [sum(math.exp(number - top) for number in half) for half in halves]
    labels = [z[label] if rank == label // 4 else 0 for rank in range(2)]
    total = sum(sums)

    def pair(kind: str, first: str, second: str) -> Grid:
        return Grid([[kind]] * 2, [[first], [second]], (38, 20))

    chance = [math.exp(number - top) / total - (n == label) for n, number in enumerate(z)]
    slopes = [
        Grid([[f"r{r}"] * 4], [[f"{c:.2f}" for c in chance[4 * r : 4 * r + 4]]], (34, 20), True)
        for r in range(2)
    ]
    return draw_both(
        [
            Tensor("z", "V", [Grid(g.kinds, g.entries, (17, 20)) for g in cut([z], 1)]),
            Tensor("max", "", [Grid([[f"r{rank}"]], [[n]]) for rank, n in enumerate(tops)]),
            Gate("all-reduce max"),
            Tensor("m", "", whole([[top]])),
            Tensor(
                "sum, z", "", [pair(f"p{r}", f"{sums[r]:.2f}", f"{labels[r]}") for r in range(2)]
            ),
            Gate("all-reduce × 2"),
            Tensor("sum, z", "", [pair("w", f"{total:.2f}", f"{z[label]}")] * 2),
            Tensor(
                "loss",
                "",
                [Grid([["w"]], [[f"{math.log(total) + top - z[label]:.2f}"]], (40, 20))] * 2,
            ),
        ],
        [
            Tensor("dz", "V", slopes),
            None,
            Gate(""),
            None,
            None,
            Gate(""),
            None,
            Tensor("d loss", "", whole([[1]])),
        ],
    )


GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = 2**64 - 1


def dropped(key: int, place: tuple[int, ...], p: float) -> bool:
    """What step 14's `Dropout` says of the element at this place, if its last index is 0."""
    bits = key & MASK
    for index in place:
        bits = (bits + (index + 1) * GOLDEN) & MASK
        for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
            bits = ((bits ^ (bits >> shift)) * factor) & MASK
    lane = ((bits & 0xFFFF) ^ 0x8000) - 0x8000  # the lowest 16 bits, signed
    return lane < round(p * 2**16) - 2**15


def key_of(seed: int, step: int, site: str) -> int:
    digest = hashlib.sha256(f"{seed}:{step}:{site}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def masks() -> str:
    """Step 14: rows down, heads across; each rank makes its part of the one mask."""
    rows = whole_number("14", "train.py", "ROWS")
    heads = whole_number("14", "config.py", "n_heads")
    p = float(found("14", "README.md", r"--dropout ([\d.]+)"))
    key = key_of(1, 1, "blocks.0.attention.dropout")
    canvas = Canvas(400)
    canvas.rect(Box(60, MARGIN, 360, 30), "box", 8)
    canvas.text(240, MARGIN + 15, "hash_lanes(seed, step, site, row, head, ..)", "small")
    size, x0, y0 = (44, 17), 130, 72
    for rank in range(4):
        dp, tp = divmod(rank, 2)
        x, y = x0 + tp * (heads // 2 * size[0] + 60), y0 + dp * (rows // 2 * size[1] + 24)
        first, head = dp * rows // 2, tp * heads // 2
        away = [
            [dropped(key, (first + i, head + j, 0, 0), p) for j in range(heads // 2)]
            for i in range(rows // 2)
        ]
        kinds = [["n" if gone else f"r{rank}" for gone in line] for line in away]
        box = canvas.grid(x, y, kinds, None, size)
        for i, line in enumerate(away):
            for j, gone in enumerate(line):
                cell = Box(x + j * size[0], y + i * size[1], *size)
                canvas.text(cell.cx, cell.cy, "0" if gone else "1", "small")
        canvas.text(box.cx, y - 10, f"rank {rank}", "small")
        if tp == 0:
            canvas.text(x - 14, box.cy, f"{first}:{first + rows // 2}", "small", "end")
            canvas.text(x - 14, box.cy - 18, f"dp {dp}", "small", "end")
    return canvas.svg()
