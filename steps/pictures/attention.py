"""Attention in three ways: gathered between (08), cut by heads (09), of two sequences (10)."""

from __future__ import annotations

from pictures.flow import Column, Gate, Pair, Tensor, draw_both
from pictures.grids import Grid, blank, blank_partial
from pictures.values import whole_number

ROW = 15  # the height of a piece of a fused weight


def pieces(names: str, width: int, owner: list[int], each: int) -> list[Grid]:
    """A fused weight as pieces of rows: for each rank those that it holds, `q 0:20`."""
    count = len(owner)
    texts = [
        [f"{names[n * len(names) // count]} {n * each}:{(n + 1) * each}"] for n in range(count)
    ]
    return [
        Grid([[f"r{rank}" if who == rank else "n"] for who in owner], texts, (width, ROW), True)
        for rank in range(2)
    ]


def columns_of(width: int, size: tuple[float, float] = (35, 24)) -> list[Grid]:
    """`dense`, cut by its columns."""
    texts = [[f"0:{width // 2}", f"{width // 2}:{width}"]]
    return [
        Grid([[f"r{rank}" if half == rank else "n" for half in range(2)]], texts, size, True)
        for rank in range(2)
    ]


def heads(count: int, split: bool) -> list[Grid]:
    """The heads that a rank attends with: its own, or all of them on each."""
    kinds = [
        [[("r0", "r1")[rank] if n * 2 // count == rank else "n"] for n in range(count)]
        if split
        else [["w"]] * count
        for rank in range(2)
    ]
    return [Grid(kind, [[n] for n in range(count)], (24, 14), True) for kind in kinds]


def gathered_attention() -> str:
    """Step 08: the fused weight in one piece a rank, all heads on each, then columns of dense."""
    width, count = (whole_number("08", "config.py", name) for name in ("d_model", "n_heads"))
    fused = pieces("qkv", 62, [0, 0, 0, 1, 1, 1], width // 2)
    stream = blank((3, 2), None)

    def way(letters: str, gates: list[Gate], d: str) -> list[Column]:
        return [
            Tensor(f"{d}x", "I", stream),
            gates[0],
            Tensor("q k v", "", fused),
            gates[1],
            Tensor("", "I", heads(count, split=False)),
            gates[2],
            Tensor("dense", "", columns_of(width)),
            Tensor(f"{d}y", letters, stream if d else blank_partial((3, 2))),
            gates[3],
            Tensor(f"{d}y", "I", stream),
        ]

    forward = [Gate("", "f"), Gate("all-gather"), Gate(""), Gate("all-reduce", "g")]
    backward = [Gate("all-reduce", "f"), Gate(""), Gate("all-gather"), Gate("", "g")]
    return draw_both(way("P", forward, ""), way("R", backward, "d"))


def parallel_attention() -> str:
    """Step 09: a rank's rows of q, k and v make its heads, and its columns of dense use them."""
    file = "test_forward_tp.py"
    count, each = (whole_number("09", file, name) for name in ("n_heads", "d_head"))
    width = count * each
    fused = pieces("qkv", 66, [0, 1] * 3, width // 2)
    stream = blank((3, 2), None)

    def way(d: str) -> list[Column]:
        return [
            Tensor(f"{d}x", "I", stream),
            Gate("all-reduce" if d else "", "f"),
            *([Tensor("dx", "P", blank_partial((3, 2)))] if d else [Tensor("x", "R", stream)]),
            Tensor("q k v", "", fused),
            Tensor("", "V", heads(count, split=True)),
            Tensor("dense", "", columns_of(width, (38, 24))),
            Tensor(f"{d}y", "R" if d else "P", stream if d else blank_partial((3, 2))),
            Gate("" if d else "all-reduce", "g"),
            Tensor(f"{d}y", "I", stream),
        ]

    return draw_both(way(""), way("d"))


def cross_attention() -> str:
    """Step 10: queries of x, keys and values of the memory m; both get a gradient of their own."""
    count = whole_number("10", "config.py", "n_heads")
    each = whole_number("10", "config.py", "d_model") // count
    width = count * each
    query = pieces("q", 66, [0, 1], width // 2)
    both = pieces("kv", 66, [0, 1, 0, 1], width // 2)
    x, m = blank((4, 2), None), blank((3, 2), None)
    dx, dm = blank_partial((4, 2)), blank_partial((3, 2))

    def way(d: str) -> list[Column]:
        inner = Pair(
            Tensor(f"{d}x", "P" if d else "R", dx if d else x),
            Tensor(f"{d}m", "P" if d else "R", dm if d else m),
        )
        return [
            Pair(Tensor(f"{d}x", "I", x), Tensor(f"{d}m", "I", m)),
            Gate("all-reduce dm, all-reduce dx" if d else "", "f"),
            inner,
            Pair(Tensor("query", "", query), Tensor("key_value", "", both)),
            Tensor("", "V", heads(count, split=True)),
            Tensor("dense", "", columns_of(width, (38, 24))),
            Tensor(f"{d}y", "R" if d else "P", x if d else dx),
            Gate("" if d else "all-reduce", "g"),
            Tensor(f"{d}y", "I", x),
        ]

    return draw_both(way(""), way("d"))
