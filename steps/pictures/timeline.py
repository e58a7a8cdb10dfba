"""When two ranks compute and when they wait for a collective, from what steps/timelines.py kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pictures.canvas import WIDTH, Box, Canvas

LEFT, RIGHT = 64, 20
LANE, ROOM = 26, 38  # the height of a rank's lane, and what a variant has above its lanes


def of_two_ranks(step: Path) -> str:
    """A group of two lanes for each variant, all to one scale; dark is where a rank waits.

    Where they were noted, a lane has boxes for its products, and below it what is being summed.
    """
    variants = json.loads((step / "timeline.json").read_text())
    longest = max(rank["end"] for ranks in variants.values() for rank in ranks)
    tick = 10 ** math.floor(math.log10(longest))
    tick = tick / 2 if longest / tick < 2.5 else tick
    step_down = LANE + (12 if any("sums" in r for ranks in variants.values() for r in ranks) else 4)
    canvas = Canvas(14 + len(variants) * (2 * step_down + ROOM) + 18)
    scale = (WIDTH - LEFT - RIGHT) / longest
    ground = canvas.height - 24
    for n in range(int(longest / tick) + 1):
        x = round(LEFT + n * tick * scale, 1)
        canvas.line((x, 14), (x, ground), kind="grid", head=False)
        canvas.text(x, ground + 12, f"{n * tick:g}", "small")
    canvas.text(LEFT - 14, ground + 12, "ms", "small", "end")
    for place, (name, ranks) in enumerate(variants.items()):
        top = 14 + place * (2 * step_down + ROOM)
        half = round(LEFT + scale * max(rank["half"] for rank in ranks), 1)
        canvas.text(LEFT, top + 10, name, "bold", "start")
        for number, rank in enumerate(ranks):
            y = top + 24 + number * step_down
            canvas.text(LEFT - 8, y + LANE / 2, f"rank {number}", "small faint", "end")
            canvas.cell(Box(LEFT, y, round(scale * rank["end"], 1), LANE), f"r{number}")
            for since, until in rank["waits"]:
                x, width = round(LEFT + scale * since, 1), round(scale * (until - since), 1)
                canvas.rect(Box(x, y, max(width, 0.5), LANE), "gate")
            for product in ("dX", "dW"):
                for since, until in rank.get(product, ()):
                    x, width = round(LEFT + scale * since, 1), round(scale * (until - since), 1)
                    box = canvas.rect(Box(x, y + 3, width, LANE - 6), "box")
                    canvas.text(box.cx, box.cy, product, "small")
            for since, until in rank.get("sums", ()):
                x, width = round(LEFT + scale * since, 1), round(scale * (until - since), 1)
                canvas.rect(Box(x, y + LANE + 2, width, 5), "gate")
        bottom = top + 24 + 2 * step_down
        canvas.line((half, top + 18), (half, bottom), kind="badline", head=False)
        canvas.text(half, top + 9, "dL", "small")
    return canvas.svg()
