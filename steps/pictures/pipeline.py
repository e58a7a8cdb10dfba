"""Steps 21 and 22: a schedule as a table, a row for each rank, a column for each unit of time."""

from __future__ import annotations

import importlib.util
from typing import Any

from ladder import find

from pictures.canvas import WIDTH, Box, Canvas

MARGIN, NAME, HELD, ROW = 12, 24, 24, 24
"""Units: around the picture, of a rank's number, of what it holds at once, of a rank's row."""

SHADES = {"F": "l", "B": "r", "I": "r", "W": "p"}


def schedules_of(number: str) -> Any:
    """The step's own schedule.py, which imports nothing."""
    spec = importlib.util.spec_from_file_location("schedule", find(number) / "schedule.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def begins(schedule: list[list[Any]]) -> dict[Any, int]:
    """When each action begins: F, I and W take 1, B takes 2."""
    found: dict[Any, int] = {}
    ends: dict[Any, int] = {}
    left, free = [list(actions) for actions in schedule], [0] * len(schedule)
    while any(left):
        for rank, actions in enumerate(left):
            while actions:
                kind, stage, n = actions[0]
                other = (kind, stage - 1 if kind == "F" else stage + 1, n)
                waits = kind != "W" and 0 <= other[1] < len(schedule)
                if waits and other not in ends:
                    break
                found[actions[0]] = max(free[rank], ends[other] if waits else 0)
                free[rank] = found[actions[0]] + (2 if kind == "B" else 1)
                ends[actions.pop(0)] = free[rank]
    return found


def most_held(actions: list[Any]) -> int:
    """Micro-batches whose activations a rank holds at once."""
    kinds = [kind for kind, _, _ in actions]
    steps = [(kind == "F") - (kind in ("B", "W")) for kind in kinds]
    return max(sum(steps[: n + 1]) for n in range(len(steps)))


def tables(number: str, names: list[str], ranks: int, micro_batches: int) -> str:
    """A schedule under the other, to one scale; at the end of a row what the rank holds at once."""
    module = schedules_of(number)
    made = {name: module.make_schedule(name, ranks, micro_batches) for name in names}
    longest = 3 * (micro_batches + ranks - 1)
    unit = (WIDTH - 2 * MARGIN - NAME - HELD) / longest
    panel = 26 + ROW * ranks + 12
    canvas = Canvas(2 * MARGIN + panel * len(made) - 12)
    for place, (name, schedule) in enumerate(made.items()):
        top = MARGIN + panel * place
        canvas.text(MARGIN + NAME, top + 10, name, "bold", "start")
        began = begins(schedule)
        for rank, actions in enumerate(schedule):
            y = top + 26 + ROW * rank
            canvas.text(MARGIN + 8, y + ROW / 2 - 1, str(rank), "faint")
            canvas.text(WIDTH - MARGIN - 8, y + ROW / 2 - 1, str(most_held(actions)), "bold")
            for action in actions:
                kind, _, n = action
                width = (2 if kind == "B" else 1) * unit
                box = Box(MARGIN + NAME + began[action] * unit, y, width, ROW - 3)
                canvas.cell(box, f"{SHADES[kind]}{rank}", str(n), small=True)
    return canvas.svg()


def all_forward_and_in_turn() -> str:
    """Step 21: both end at one time, and one holds four micro-batches where the other holds six."""
    return tables("21", ["afab", "1f1b"], 4, 6)


def weights_fill_the_gaps() -> str:
    """Step 22: W stands where 1F1B waits."""
    return tables("22", ["1f1b", "zero-bubble"], 4, 6)
