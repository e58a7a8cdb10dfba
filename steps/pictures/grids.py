"""What a rank has of a matrix, as colored cells; and small matrices to fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

Matrix = list[list[int]]


@dataclass(frozen=True)
class Grid:
    """A rank's tensor: a color for each cell, entries where there are some, a cell's size."""

    kinds: list[list[str]]
    entries: Sequence[Sequence[object]] | None = None
    size: tuple[float, float] = (22, 20)
    small: bool = False  # the letters

    @property
    def w(self) -> float:
        return len(self.kinds[0]) * self.size[0]

    @property
    def h(self) -> float:
        return len(self.kinds) * self.size[1]


def times(a: Matrix, b: Matrix) -> Matrix:
    """a b"""
    columns = transposed(b)
    return [
        [sum(p * q for p, q in zip(row, column, strict=True)) for column in columns] for row in a
    ]


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def plus(a: Matrix, b: Matrix) -> Matrix:
    return [[p + q for p, q in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]


def whole(entries: Matrix, ranks: int = 2, kind: str = "w") -> list[Grid]:
    """The same on every rank."""
    return [Grid([[kind] * len(entries[0])] * len(entries), entries) for _ in range(ranks)]


def cut(entries: Matrix, dim: int, ranks: int = 2) -> list[Grid]:
    """On each rank its slice in its color, in the place that it has in the whole."""
    shape = (len(entries), len(entries[0]))
    return [replace(grid, entries=entries) for grid in blank(shape, dim, (22, 20), ranks)]


def blank(
    shape: tuple[int, int], dim: int | None, size: tuple[float, float] = (11, 11), ranks: int = 2
) -> list[Grid]:
    """A tensor without entries, whole (dim None) or cut along dim."""

    def kind(rank: int, cell: tuple[int, int]) -> str:
        if dim is None:
            return "w"
        return f"r{rank}" if cell[dim] * ranks // shape[dim] == rank else "n"

    rows, columns = shape
    return [
        Grid([[kind(rank, (i, j)) for j in range(columns)] for i in range(rows)], None, size)
        for rank in range(ranks)
    ]


def blank_partial(shape: tuple[int, int], size: tuple[float, float] = (11, 11)) -> list[Grid]:
    """On each of two ranks a term of a sum, without entries."""
    return [Grid([[f"p{rank}"] * shape[1]] * shape[0], None, size) for rank in range(2)]


def partial(terms: list[Matrix]) -> list[Grid]:
    """On each rank its own term of a sum."""
    return [
        Grid([[f"p{rank}"] * len(term[0])] * len(term), term) for rank, term in enumerate(terms)
    ]
