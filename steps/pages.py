"""The pages of the steps: diffs and excerpts of the real files, alike in both languages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ladder import STEPS, StepError, read
from pictures.album import write_pictures
from written import ending, pair, shown_diff, write_it

SECTIONS = {  # the headings of a page, in their order, and those of the Chinese one
    "Predict first": "先猜一猜",
    "The problem": "问题",
    "The idea": "思路",
    "The maths": "公式",
    "Run it": "命令",
    "What you should see": "输出",
    "Experiment": "实验",
    "Answers": "答案",
    "Write it yourself": "自己写一遍",
    "The diff": "代码改动",
    "Still naive": "还有哪些不足",
    "If you see this error": "如果你看到这个错误",
    "Exercises": "练习",
    "What you have built": "你写出了什么",
}


def excerpt(path: Path, name: str) -> str:
    """The source of a class, function or method: "FeedForward", "FeedForward.forward"."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [n for n in body if getattr(n, "name", None) == part]
        if not found:
            raise StepError(
                f"{path.relative_to(STEPS)} has no {name}, which a line <!-- code: --> of its page "
                "asks for; name a class, function or method that is there"
            )
        node = found[0]
        body = getattr(node, "body", [])
    return "".join(read(path)[node.lineno - 1 : node.end_lineno])


def with_excerpts(text: str, folder: Path) -> str:
    """A page's text, with the code that its lines <!-- code: --> ask for."""

    def excerpt_block(match: re.Match[str]) -> str:
        source = excerpt(folder / match[2], match[3])
        return f"{match[1]}```python\n{source}```\n<!-- /code -->"

    marked = r"(<!-- code: (\S+) (\S+) -->\n).*?<!-- /code -->"
    return re.sub(marked, excerpt_block, text, flags=re.DOTALL)


def written_anew(page: Path) -> str:
    """The page with all that a program writes on it, from the real files.

    Raises StepError if it has no diff block.
    """
    text = page.read_text()
    block = re.compile(r"(<!-- diff((?: \S+\.py)*) -->\n).*?(<!-- /diff -->)", re.DOTALL)
    if not block.search(text):
        raise StepError(
            f"{page.relative_to(STEPS)} has no lines <!-- diff NAME.py --> and <!-- /diff -->; "
            "write them where the diff belongs and name the files that hold the step's idea, then "
            "run steps.py readme, which fills in what changed"
        )
    text = block.sub(lambda match: match[1] + shown_diff(page, match[2].split()) + match[3], text)
    block = re.compile(r"(<!-- mine -->\n).*?(<!-- /mine -->)", re.DOTALL)
    text = block.sub(lambda match: match[1] + write_it(page) + match[2], text)
    block = re.compile(r"(<!-- built -->\n).*?(<!-- /built -->)", re.DOTALL)
    text = block.sub(lambda match: match[1] + ending(page) + match[2], text)
    block = re.compile(r"(<!-- pair -->\n).*?(<!-- /pair -->)", re.DOTALL)
    text = block.sub(lambda match: match[1] + pair(page.parent) + match[2], text)
    return with_excerpts(text, page.parent)


def pages(step: Path) -> list[Path]:
    found = [step / "README.md", step / "README.zh.md"]
    for page in found:
        if not page.exists():
            raise StepError(
                f"{page.relative_to(STEPS)} is missing; write it with the headings of the other "
                "language's page: a step is taught in both"
            )
    return found


def readme(steps: list[Path]) -> None:
    for step in steps:
        for page in pages(step):
            page.write_text(written_anew(page))
    write_pictures(steps)


def says(page: Path) -> dict[str, object]:
    """What both languages must share."""
    fence = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    prose = fence.sub("", text)
    return {
        "code": fence.findall(text),
        "headings": re.findall(r"^#+(?= )", prose, re.MULTILINE),
        "figures": set(re.findall(r"\d+(?:\.\d+)?e-\d+|\d+\.\d+", prose)),
    }


def headings(page: Path) -> list[str]:
    """The page's sections, without what follows a colon: "Experiment: no attention at all"."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [re.split("[:：]", title)[0] for title in re.findall(r"^## (.*)", prose, re.MULTILINE)]


def heading(name: str, page: Path) -> str:
    """A section's heading in the page's language."""
    return SECTIONS[name] if page.name == "README.zh.md" else name


def predictions(page: Path) -> tuple[int, ...]:
    """How many things the page asks at its beginning, and how many of them it answers, folded."""
    sections = page.read_text().split("\n## ")
    found = {section.partition("\n")[0]: section for section in sections}
    names = ("Predict first", "Answers")
    asked, answers = (found.get(heading(name, page), "") for name in names)
    folded = answers.partition("<details>")[2].partition("</details>")[0]
    return tuple(len(re.findall(r"^\d\. ", text, re.MULTILINE)) for text in (asked, folded))
