"""The steps in order: which there are, what each grows out of, and how much it adds."""

from __future__ import annotations

import ast
import difflib
import re
from collections import Counter
from collections.abc import Collection
from functools import cache
from itertools import chain
from pathlib import Path

STEPS = Path(__file__).resolve().parent
FIRST = ("00", "01")  # steps that grow out of nothing


class StepError(Exception):
    """One line for the reader."""


def folders() -> list[Path]:
    return sorted(path for path in STEPS.iterdir() if re.match(r"\d\d_", path.name))


def find(number: str) -> Path:
    """The folder of a step. Raises StepError if there is none."""
    for folder in folders():
        if folder.name in (number, Path(number).name) or folder.name[:2] == number.zfill(2):
            return folder
    known = ", ".join(folder.name[:2] for folder in folders())
    raise StepError(f"there is no step {number}; it can be {known}")


def parent(step: Path) -> Path | None:
    """The step that this one grows out of: the one before, unless its page's top says otherwise."""
    if step.name[:2] in FIRST:
        return None
    page = step / "README.md"
    top = "".join(read(page)[:6])
    if named := re.search(r"[Gg]rows out of (?:step )?\[(\d\d)", top):
        return find(named[1])
    return [folder for folder in folders() if folder.name < step.name][-1]


def first_route() -> list[str]:
    """The steps of the afternoon: those that its paragraph names with minutes."""
    page = (STEPS / "README.md").read_text()
    paragraph = page.split("## One afternoon")[1].split("\n\n")[1].partition(". You")[0]
    return re.findall(r"\b(\d\d) \(\d+", paragraph)


def read(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def python_files(*steps: Path | None) -> list[str]:
    return sorted({path.name for step in steps if step for path in step.glob("*.py")})


def given(step: Path) -> list[str]:
    """The files that a reader who writes the step is given: its tests and their oracle."""
    return [name for name in python_files(step) if name.startswith("test_") or name == "oracle.py"]


def diff(step: Path) -> dict[str, str]:
    """The unified diff from the parent to the step, of each Python file that differs."""
    old = parent(step)
    changed = {}
    for name in python_files(old, step):
        before, after = (tuple(read(folder / name)) if folder else () for folder in (old, step))
        origin = f"{old.name}/{name}" if old and before else "/dev/null"
        changed[name] = unified_diff(before, after, origin, f"{step.name}/{name}")
    return {name: text for name, text in changed.items() if text}


@cache  # a page shows parts of it in several places, in two languages
def unified_diff(before: tuple[str, ...], after: tuple[str, ...], origin: str, changed: str) -> str:
    return "".join(difflib.unified_diff(before, after, origin, changed, n=2))


def added_code(step: Path, but: Collection[str] = ()) -> int:
    """Lines of code that the parent has not, outside of some files: no blank line, comment or
    docstring, and no line that only moved, within its file or to another."""
    counts: list[Counter[str]] = []
    for folder in (step, parent(step)):
        names = set(python_files(folder)) - set(but)
        sources = ("".join(read(folder / name)) for name in names) if folder else ()
        counts.append(Counter(chain.from_iterable(map(code_lines, sources))))
    return (counts[0] - counts[1]).total()


@cache
def code_lines(source: str) -> tuple[str, ...]:
    """Without their indentation."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(map(str.strip, source.splitlines()), 1)
    code = (line for n, line in numbered if n not in documented)
    return tuple(line for line in code if line and line[0] != "#")
