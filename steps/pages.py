"""The pages of the steps: diffs and excerpts of the real files, alike in both languages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ladder import STEPS, StepError, diff, read
from pictures.album import write_pictures


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


def written_anew(page: Path) -> str:
    """The page with its diff and its excerpts from the real files.

    Raises StepError if it has no diff block.
    """

    def excerpt_block(match: re.Match[str]) -> str:
        source = excerpt(page.parent / match[2], match[3])
        return f"{match[1]}```python\n{source}```\n<!-- /code -->"

    text = page.read_text()
    block = re.compile(r"(<!-- diff -->\n).*?(<!-- /diff -->)", re.DOTALL)
    if not block.search(text):
        raise StepError(
            f"{page.relative_to(STEPS)} has no lines <!-- diff --> and <!-- /diff -->; write them "
            "where the diff belongs, then run steps.py readme, which fills in what changed"
        )
    shown = f"```diff\n{diff(page.parent)}```\n"
    text = block.sub(lambda match: match[1] + shown + match[2], text)
    marked = r"(<!-- code: (\S+) (\S+) -->\n).*?<!-- /code -->"
    return re.sub(marked, excerpt_block, text, flags=re.DOTALL)


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
