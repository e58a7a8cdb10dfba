"""Steps 15 and 16: the bytes that a rank keeps, in the figures that their pages print."""

from __future__ import annotations

import re

from pictures.canvas import WIDTH, Box, Canvas
from pictures.plots import LEFT, RIGHT, Panel, legend
from pictures.values import found, text_of

KIB = 1024


def of_a_block() -> str:
    """Step 15: a block's KiB on two and on four ranks, between the cut layers and inside them."""
    words = found("15", "README.md", r"keeps (\d+ KiB on two ranks and \d+) on four")
    inside = [int(number) for number in re.findall(r"\d+", words)]
    canvas = Canvas(262)
    ground, scale, wide = 204, 174 / 1300, 88
    for place, (tp, sequence_parallel) in enumerate(
        (tp, flag) for tp in (2, 4) for flag in (False, True)
    ):
        pattern = rf"tp {tp}, dropout 0\.0, sequence-parallel {sequence_parallel}: (\d+) bytes"
        total = int(found("15", "README.md", pattern)) / KIB
        within = inside[tp == 4]
        x = 30 + place * 104 + (tp == 4) * 16
        low = Box(x, ground - within * scale, wide, within * scale)
        high = Box(x, ground - total * scale, wide, (total - within) * scale)
        canvas.cell(low, "w", str(within))
        canvas.cell(high, "r1" if sequence_parallel else "r0", f"{total - within:.0f}")
        canvas.text(high.cx, high.y - 10, f"{total:.0f} KiB", "small")
        canvas.text(high.cx, ground + 12, "reduce-scatter" if sequence_parallel else "all-reduce")
        if sequence_parallel:
            canvas.text(x - 8, ground + 36, f"tp {tp}", "bold")
    return canvas.svg()


def for_time() -> str:
    """Step 16: what is kept, over the seconds of a step; a curve for each dropout rate."""
    row = r"^ +(0\.\d) +(none|attention|block) +([\d.]+) s +([\d.]+) MiB$"
    rows = re.findall(row, text_of("16", "README.md"), re.MULTILINE)
    canvas = Canvas(270)
    panel = Panel(canvas, Box(LEFT, 14, WIDTH - LEFT - RIGHT, 216), 12, 0, 320)
    for mib in (100, 200, 300):
        panel.tick(mib, str(mib))
    rates = sorted({rate for rate, *_ in rows})
    for n, rate in enumerate(rates):
        points = [
            (panel.x(10 * float(seconds)), panel.y(float(mib)))
            for dropout, _, seconds, mib in rows
            if dropout == rate
        ]
        canvas.line(*((round(x, 1), round(y, 1)) for x, y in points), kind=f"c{n}", head=False)
    for _, mode, seconds, mib in rows:
        x, y = panel.x(10 * float(seconds)), panel.y(float(mib))
        canvas.parts.append(f'<circle class="box" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        left = mode == "none"
        canvas.text(x + (-8 if left else 8), y - 10, mode, "small", "end" if left else "start")
    for tenths in range(0, 12, 3):
        canvas.text(panel.x(tenths), panel.box.bottom + 12, f"{tenths / 10:g} s", "small")
    canvas.text(LEFT - 6, panel.box.bottom, "MiB", "small", "end")
    legend(canvas, LEFT + 16, 34, [f"dropout {rate}" for rate in rates])
    return canvas.svg()
