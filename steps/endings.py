"""What stands at the end of a page: how much was built, what is naive, and what comes next."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from ladder import added_code, code_lines, first_route, folders, parent, python_files, read

WORDS = {  # of the page in each language
    "README.md": {
        "code": "code",
        "lines": "{} lines with the tests, {} of them new in this step",
        "tests": "tests",
        "checks": "{1} checks in `{0}`",
        "naive": "still naive",
        "more": "; [{} more](#still-naive)",
        "next": "next",
        "aside": " (a side road)",
        "route": "on the afternoon's route: ",
        "package": "the package, `rosetrainer/`",
        "join": "; ",
    },
    "README.zh.md": {
        "code": "代码",
        "lines": "连测试 {} 行，其中 {} 行是这一步新增的",
        "tests": "测试",
        "checks": "`{0}` 里有 {1} 项检查",
        "naive": "不足",
        "more": "；[另有 {} 条](#还有哪些不足)",
        "next": "下一步",
        "aside": "（支线）",
        "route": "“一个下午”的路线：",
        "package": "包 `rosetrainer/`",
        "join": "；",
    },
}
NAIVE = {"README.md": "Still naive", "README.zh.md": "还有哪些不足"}


def ending(page: Path) -> str:
    """The table under the page's last heading."""
    step, words = page.parent, WORDS[page.name]
    lines = sum(len(code_lines((step / name).read_text())) for name in python_files(step))
    points = naive_points(page)
    more = words["more"].format(len(points) - 1) if len(points) > 1 else ""
    rows = [
        ("", step.name[:2]),
        ("---", "---"),
        (words["code"], words["lines"].format(lines, added_code(step))),
        (words["tests"], ", ".join(tests(step, words["checks"]))),
        (words["naive"], first_sentence(points[0]) + more),
        (words["next"], next_pages(page)),
    ]
    return "".join(f"| {name} | {text} |\n" for name, text in rows)


def tests(step: Path, words: str) -> list[str]:
    """Each test file, with the number of its check functions if it has any."""
    names = [name for name in python_files(step) if name.startswith("test_")]
    counts = [len(re.findall(r"^def check_", (step / name).read_text(), re.M)) for name in names]
    return [
        words.format(name, n) if n else f"`{name}`" for name, n in zip(names, counts, strict=True)
    ]


def naive_points(page: Path) -> list[str]:
    """The items of the page's section on what is naive: a list's, a table's, or a paragraph."""
    section = page.read_text().partition(f"\n## {NAIVE[page.name]}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.M)[1:]
    return re.findall(r"^- (.*)", section, re.M) or rows or [section.strip()]


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:]) |(?<=[。：])", text)[0].rstrip(".:。：")


def next_pages(page: Path) -> str:
    """Links to what grows out of the step, and to the next step of the afternoon if it jumps."""
    step, words, steps = page.parent, WORDS[page.name], folders()
    if step == steps[-1]:
        return f"[{words['package']}](../../rosetrainer/{page.name})"
    after = steps[steps.index(step) + 1]
    found = [other for other in steps if parent(other) == step and other != after]
    side = words["aside"] if found else ""
    links = [link(after, page.name) + side, *(link(other, page.name) for other in found)]
    route = first_route()
    jump = dict(pairwise(route)).get(step.name[:2])
    if jump and not after.name.startswith(jump):
        target = next(other for other in steps if other.name.startswith(jump))
        links.append(words["route"] + link(target, page.name))
    return words["join"].join(links)


def link(step: Path, name: str) -> str:
    titles = [line[2:].strip() for line in read(step / name) if line.startswith("# ")]
    return f"[{(titles or [step.name])[0]}](../{step.name}/{name})"
