"""What a program writes on a page: its diff, how to write the step, and the table at its end."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

from curves import PAIRS
from ladder import (
    StepError,
    added_code,
    code_lines,
    diff,
    first_route,
    folders,
    given,
    parent,
    python_files,
    read,
)

WORDS = {  # of the page in each language
    "README.md": {
        "idea": (
            "The idea stands in {} of the diff's {} lines, in {}. In all, the step adds {} lines "
            "of code: blank lines, comments, docstrings and lines that only moved do not count."
        ),
        "rest": "The tests, and what else changes: {} lines",
        "from": "You begin with the files of step {}, and with this step's tests.",
        "empty": "You begin with this step's tests and nothing else.",
        "write": "What is left to write is {} lines of code, in {}. From the repository's root:",
        "until": (
            "Write until the last line is `green: step {} is yours`. Before that, `red:` stands in "
            "front of the line that failed."
        ),
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
        "and": ", ",
    },
    "README.zh.md": {
        "idea": (
            "整个改动 {1} 行，核心思想在其中的 {0} 行里，也就是 {2}。这一步一共新增 {3} 行代码："
            "空行、注释、docstring 和只是挪了位置的行不算。"
        ),
        "rest": "测试和其余改动：{} 行",
        "from": "开始时，你有步骤 {} 的文件和这一步的测试。",
        "empty": "开始时，你只有这一步的测试。",
        "write": "还要写 {} 行代码，在 {} 里。先在仓库根目录下运行：",
        "until": (
            "一直写到输出的最后一行是 `green: step {} is yours`。"
            "在那之前，`red:` 后面指出失败的是哪一行。"
        ),
        "code": "代码",
        "lines": "连测试共 {} 行，其中 {} 行是这一步新增的",
        "tests": "测试",
        "checks": "`{0}` 里有 {1} 项检查",
        "naive": "不足",
        "more": "；[另有 {} 条](#还有哪些不足)",
        "next": "下一步",
        "aside": "（支线）",
        "route": "“一个下午”的路线：",
        "package": "包 `rosetrainer/`",
        "join": "；",
        "and": "、",
    },
}
START = """```bash
.venv/bin/python steps/steps.py start {0} out/my_{0}
.venv/bin/python steps/steps.py test --mine out/my_{0} {0}
```"""
NAIVE = {"README.md": "Still naive", "README.zh.md": "还有哪些不足"}


def shown_diff(page: Path, idea: list[str]) -> str:
    """The diff of the files that hold the step's idea, then that of the others, folded."""
    step, words = page.parent, WORDS[page.name]
    changed = diff(step)
    if missing := [name for name in idea if name not in changed]:
        raise StepError(
            f"{step.name}/{page.name} names {missing[0]} in its line <!-- diff -->, which the step "
            f"does not change; it can be {', '.join(changed)}"
        )
    first = "".join(changed[name] for name in idea or changed)
    rest = "".join(text for name, text in changed.items() if idea and name not in idea)
    files = words["and"].join(f"`{name}`" for name in idea or changed)
    counts = [text.count("\n") for text in (first, first + rest, rest)]
    told = words["idea"].format(*counts[:2], files, added_code(step))
    shown = f"{told}\n\n```diff\n{first}```\n"
    if rest:
        summary = words["rest"].format(counts[2])
        shown += f"\n<details>\n<summary>{summary}</summary>\n\n```diff\n{rest}```\n\n</details>\n"
    return shown


def write_it(page: Path) -> str:
    """How a reader writes the step: what is there, what is missing, and the commands."""
    step, words, old = page.parent, WORDS[page.name], parent(page.parent)
    number, tests = step.name[:2], given(step)
    files = words["and"].join(
        f"`{name}`" for name in diff(step) if name in set(python_files(step)) - set(tests)
    )
    begin = words["from"].format(old.name[:2]) if old else words["empty"]
    left = words["write"].format(added_code(step, tests), files)
    gap = " " if page.name == "README.md" else ""
    return f"{begin}{gap}{left}\n\n{START.format(number)}\n\n{words['until'].format(number)}\n"


def pair(step: Path) -> str:
    """Code that looks right in the place of the step's, and the curves of both."""
    run = PAIRS[step.name[:2]]
    if (step / run.file).read_text().count(run.old) != 1:
        raise StepError(
            f"{step.name}/{run.file} has no longer what the pair of the step replaces (PAIRS in "
            "steps/curves.py); change it there, then measure it by steps/plots.py: the page shows "
            "it"
        )
    code = dedent(run.new)
    return f"```python\n# {run.file}\n{code}```\n\n![A, B](pair.svg)\n"


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
        (words["tests"], words["and"].join(tests(step, words["checks"]))),
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
