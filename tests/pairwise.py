"""Few combinations of settings that meet every pair of them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CANDIDATES, SAMPLE = 6000, 1000
Row = tuple[Any, ...]


def rows(
    factors: Sequence[Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Greedily, always the candidate that meets most pairs of settings not met so far.

    Candidates are all combinations that are allowed, or a sample of them where there are many.
    """
    candidates: Sequence[Row]
    if math.prod(map(len, factors)) <= CANDIDATES:
        candidates = list(itertools.product(*factors))
    else:
        draw = random.Random(1)
        candidates = [tuple(map(draw.choice, factors)) for _ in range(SAMPLE)]
    candidates = [row for row in candidates if allowed(row)]
    places = list(itertools.combinations(range(len(factors)), 2))
    bits: dict[Any, int] = {}  # of each pair: sets take seconds, in every rank that imports this
    met = [
        sum(bits.setdefault((i, j, row[i], row[j]), 1 << len(bits)) for i, j in places)
        for row in candidates
    ]
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(candidates)), key=lambda n: (met[n] & missing).bit_count())
        missing &= ~met[best]
        chosen.append(candidates[best])
    return chosen


def pairs_never_met(
    factors: Mapping[str, Sequence[Any]], chosen: Sequence[Row]
) -> set[tuple[str, Any, str, Any]]:
    """(setting, value, other setting, its value) that no chosen row has together."""
    names = list(factors)
    return {
        (names[i], a, names[j], b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a, b in itertools.product(factors[names[i]], factors[names[j]])
        if not any(row[i] == a and row[j] == b for row in chosen)
    }
