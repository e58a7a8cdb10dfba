"""The ladder: a rung a step, with a small picture of what it cuts; the routes have a color each."""

from __future__ import annotations

import re

from ladder import STEPS, first_route, folders

from pictures.canvas import WIDTH, Box, Canvas

RUNG, LEFT, RAIL = 30, 78, 24
ICONS: dict[str, list[str]] = {  # rows of cells: 0 and 1 a rank's, w whole, - nothing
    "00": ["0-1", "www"],
    "01": ["w---", "ww--", "www-", "wwww"],
    "02": ["www-", "-www"],
    "03": ["00000", "00000", "11111", "11111"],
    "04": ["000", "000", "111", "111"],
    "05": ["00ww", "11ww"],
    "06": ["0011", "0011", "0011"],
    "07": ["00-0011", "11-0011"],
    "08": ["0011ww", "0011ww"],
    "09": ["0101", "0101", "0101"],
    "10": ["01-", "01-", "-01", "-01"],
    "11": ["0011", "0011", "2233", "2233"],
    "12": ["00", "00", "11", "1w"],
    "13": ["000111", "0--1--"],
    "14": ["0-00", "-000", "11-1", "1-11"],
    "15": ["00--", "--11"],
    "16": ["w---", "-w--", "--w-", "w---"],
    "17": ["wwwwwwww", "wwww----"],
    "18": ["0011", "----", "0123"],
    "19": ["000---", "--1111"],
    "20": ["00--", "--00", "11--", "--11"],
    "21": ["000--", "-111-", "--222"],
    "22": ["00000", "-1111", "--222"],
    "23": ["00000-", "--1111"],
    "24": ["ww0", "ww1"],
    "25": ["0--", "0w-", "-w1", "--1"],
}


def minutes() -> dict[str, str]:
    """From the table of the ladder's page."""
    rows = re.findall(r"^\| \[(\d\d)\].*?\| (\d+) \|", (STEPS / "README.md").read_text(), re.M)
    return dict(rows)


def the_ladder() -> str:
    steps, told, route = folders(), minutes(), first_route()
    canvas = Canvas(20 + RUNG * (len(steps) + 1) + 6)
    last = 0.0
    for row, step in enumerate(steps):
        number, aside = step.name[:2], step.name.startswith("10_")
        y = 24 + row * RUNG
        x = RAIL + (26 if aside else 0)
        if aside:
            canvas.line((RAIL + 13, last), (x, last), (x, y - 12), kind="thin")
        elif row:
            canvas.line((RAIL, last + 12), (RAIL, y - 11))
        kind = "r0" if number in route else "r1" if number > "10" else "w"
        canvas.rect(Box(x - 13, y - 11, 26, 22), f"{kind} cell", 6)
        canvas.text(x, y, number, "bold small")
        icon(canvas, ICONS.get(number, []), Box(LEFT, y - 12, 62, 24))
        canvas.text(LEFT + 72, y, step.name[3:], "", "start")
        canvas.text(WIDTH - 16, y, told.get(number, ""), "small faint", "end")
        last = last if aside else y
    y = 24 + len(steps) * RUNG
    canvas.line((RAIL, last + 12), (RAIL, y - 13))
    canvas.rect(Box(RAIL - 13, y - 12, 130, 24), "gate", 6)
    canvas.text(RAIL + 52, y, "rosetrainer/", "on bold")
    return canvas.svg()


def icon(canvas: Canvas, rows: list[str], room: Box) -> None:
    if not rows:
        return
    longest = max(map(len, rows))
    size = min(room.h / len(rows), room.w / longest, 9)
    width = longest * size
    for i, row in enumerate(rows):
        for j, letter in enumerate(row):
            kind = {"w": "w", "-": ""}.get(letter, f"r{letter}")
            if kind:
                y = room.cy + (i - len(rows) / 2) * size
                canvas.cell(Box(room.cx - width / 2 + j * size, y, size, size), kind)
