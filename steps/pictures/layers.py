"""The linear layers that are cut, with matrices so small that every entry can be checked."""

from __future__ import annotations

from dataclasses import replace

from pictures.flow import Column, Gate, Tensor, draw_both, draw_ways
from pictures.grids import blank, blank_partial, cut, partial, plus, times, transposed, whole
from pictures.values import whole_number

HALVES = (slice(2), slice(2, 4))  # of four features, on two ranks


def column_parallel() -> str:
    """Step 04: a slice of W's rows makes a slice of Y; every slice has a term of dX."""
    x = [[1, 2], [3, 1]]  # (T, I)
    w = [[1, 0], [2, 1], [0, 3], [1, 1]]  # (O, I)
    dy = [[1, 0, 1, 2], [0, 1, 1, 0]]  # (T, O)
    y = times(x, transposed(w))
    terms = [times([row[half] for row in dy], w[half]) for half in HALVES]
    return draw_both(
        [
            Tensor("X", "I", whole(x)),
            Gate("", "f"),
            Tensor("X", "R", whole(x)),
            Tensor("W", "", cut(w, 0)),
            Tensor("Y", "V", cut(y, 1)),
            Gate("all-gather"),
            Tensor("Y", "I", whole(y)),
        ],
        [
            Tensor("dX", "I", whole(plus(*terms))),
            Gate("all-reduce", "f"),
            Tensor("dX", "P", partial(terms)),
            Tensor("W", "", cut(w, 0)),
            Tensor("dY", "V", cut(dy, 1)),
            Gate(""),
            Tensor("dY", "I", whole(dy)),
        ],
    )


def row_parallel() -> str:
    """Step 06: a slice of W's columns reads a slice of X and makes a term of Y; b counts once."""
    x = [[1, 2, 0, 3], [2, 0, 1, 1]]  # (T, I)
    w = [[1, 0, 2, 1], [2, 1, 0, 1]]  # (O, I)
    dy = [[1, 2], [0, 1]]  # (T, O)
    terms = [times([r[half] for r in x], transposed([r[half] for r in w])) for half in HALVES]
    total, b = plus(*terms), [[5, 7]]
    y = plus(total, b * 2)
    return draw_both(
        [
            Tensor("X", "V", cut(x, 1)),
            Tensor("W", "", cut(w, 1)),
            Tensor("Y", "P", partial(terms)),
            Gate("all-reduce", "g"),
            Tensor("Y", "I", whole(total)),
            Tensor("b", "I", whole(b)),
            Tensor("Y", "I", whole(y)),
        ],
        [
            Tensor("dX", "V", cut(times(dy, w), 1)),
            Tensor("W", "", cut(w, 1)),
            Tensor("dY", "R", whole(dy)),
            Gate("", "g"),
            Tensor("dY", "I", whole(dy)),
            Tensor("db", "I", whole([[sum(column) for column in transposed(dy)]])),
            Tensor("dY", "I", whole(dy)),
        ],
    )


def feed_forward() -> str:
    """Step 07: the hidden features are made and used on one rank; a cell is 32 features wide."""
    d = whole_number("07", "config.py", "d_model")
    narrow, wide = d // 32, 4 * d // 32
    stream, hidden = (3, narrow), (3, wide)
    own = [f"{4 * d // 2}"] * 2
    return draw_both(
        [
            Tensor("X", "I", blank(stream, None), [f"{d}"] * 2),
            Gate("", "f"),
            Tensor("X", "R", blank(stream, None)),
            Tensor("U", "", blank((wide, narrow), 0)),
            Tensor("H", "V", blank(hidden, 1, (10, 11)), own),
            Tensor("W", "", blank((narrow, wide), 1, (10, 11))),
            Tensor("Y", "P", blank_partial(stream)),
            Gate("all-reduce", "g"),
            Tensor("Y", "I", blank(stream, None), [f"{d}"] * 2),
        ],
        [
            Tensor("dX", "I", blank(stream, None), [f"{d}"] * 2),
            Gate("all-reduce", "f"),
            Tensor("dX", "P", blank_partial(stream)),
            Tensor("U", "", blank((wide, narrow), 0)),
            Tensor("dH", "V", blank(hidden, 1, (10, 11)), own),
            Tensor("W", "", blank((narrow, wide), 1, (10, 11))),
            Tensor("dY", "R", blank(stream, None)),
            Gate("", "g"),
            Tensor("dY", "I", blank(stream, None), [f"{d}"] * 2),
        ],
    )


def gathered_layers() -> str:
    """Step 05: two layers of a block are cut, and what they make is whole again at once."""
    d = whole_number("05", "config.py", "d_model")
    stream, widths = blank((3, d // 32), None), [f"{d}"] * 2
    ways = []
    for cut_layer, width, whole_layer in (
        ("query_key_value", 3 * d, "dense"),
        ("dense_h_to_4h", 4 * d, "dense_4h_to_h"),
    ):
        narrow, wide, cell = d // 32, width // 32, (7, 11)
        halves = [f"0:{width // 2}", f"{width // 2}:{width}"]
        cut_weight = Tensor("", "", blank((wide, narrow), 0, (11, 13)), halves)
        inputs = wide if width == 4 * d else narrow
        weight = Tensor("", "", blank((narrow, inputs), None, cell))
        part, hidden = blank((3, wide), 1, cell), blank((3, wide), None, cell)
        forward: list[Column] = [
            Tensor("x", "I", stream, widths),
            Gate("", "f"),
            Tensor("x", "R", stream),
            replace(cut_weight, name=cut_layer),
            Tensor("h", "V", part, [f"{width // 2}"] * 2),
            Gate("all-gather"),
            Tensor("h", "I", hidden, [f"{width}"] * 2),
            replace(weight, notes=[whole_layer] * 2),
            Tensor("y", "I", stream),
        ]
        backward: list[Column] = [
            Tensor("dx", "I", stream, widths),
            Gate("all-reduce", "f"),
            Tensor("dx", "P", blank_partial((3, narrow))),
            cut_weight,
            Tensor("dh", "V", part, [f"{width // 2}"] * 2),
            Gate(""),
            Tensor("dh", "I", hidden, [f"{width}"] * 2),
            weight,
            Tensor("dy", "I", stream),
        ]
        ways.append((forward, backward))
    return draw_ways(*ways)
