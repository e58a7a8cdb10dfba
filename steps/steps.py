"""Keeps the steps: python steps/steps.py readme | check | test NN

readme    writes each README's diff block from the real files
check     what holds for every step: fresh diffs, at most 200 added lines of code, no import of
          the package, both languages alike
test NN   runs the test of step NN, by number or name
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

STEPS = Path(__file__).resolve().parent
LARGEST = 200  # added lines of code
PARENTS: dict[str, str | None] = {"00": None, "01": None}  # a step's parent is the one before it
BLOCK = re.compile(r"(<!-- diff -->\n).*?(<!-- /diff -->)", re.DOTALL)


class StepError(Exception):
    """One line for the reader."""


def folders() -> list[Path]:
    return sorted(path for path in STEPS.iterdir() if re.match(r"\d\d_", path.name))


def parent(step: Path) -> Path | None:
    number = step.name[:2]
    if number in PARENTS:
        name = PARENTS[number]
        return None if name is None else find(name)
    before = [folder for folder in folders() if folder.name < step.name]
    return before[-1]


def find(number: str) -> Path:
    """The folder of a step. Raises StepError if there is none."""
    for folder in folders():
        if folder.name in (number, Path(number).name) or folder.name[:2] == number.zfill(2):
            return folder
    known = ", ".join(folder.name[:2] for folder in folders())
    raise StepError(f"there is no step {number}; it can be {known}")


def diff(step: Path) -> str:
    """The unified diff of the Python files from the parent to the step."""
    old = parent(step)
    lines: list[str] = []
    for name in python_files(old, step):
        before, after = (read(folder / name) if folder else [] for folder in (old, step))
        origin = f"{old.name}/{name}" if old and before else "/dev/null"
        lines += difflib.unified_diff(before, after, origin, f"{step.name}/{name}", n=2)
    return "".join(lines)


def read(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def added_code(step: Path) -> int:
    """Lines of code that the parent has not: no blank line, comment or docstring, and no line
    that only moved, within its file or to another."""
    old = parent(step)
    changes: Counter[str] = Counter()
    for name in python_files(step, old):
        before, after = (code_lines(folder / name) if folder else [] for folder in (old, step))
        for change in difflib.ndiff(before, after):
            if change[0] in "+-":
                changes[change[0] + change[1:].strip()] += 1
    moved = sum(min(n, changes["-" + line[1:]]) for line, n in changes.items() if line[0] == "+")
    return sum(n for line, n in changes.items() if line[0] == "+") - moved


def python_files(*folders: Path | None) -> list[str]:
    return sorted({path.name for folder in folders if folder for path in folder.glob("*.py")})


def code_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    source = path.read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(source.splitlines(), 1)
    return [s for n, s in numbered if n not in documented and s.strip() and s.strip()[0] != "#"]


def with_diff(page: Path) -> str:
    """The page with its diff block written anew. Raises StepError if it has none."""
    text = page.read_text()
    if not BLOCK.search(text):
        raise StepError(f"{page.relative_to(STEPS)} has no lines <!-- diff --> and <!-- /diff -->")
    block = f"```diff\n{diff(page.parent)}```\n"
    return BLOCK.sub(lambda match: match[1] + block + match[2], text)


def readme() -> None:
    for step in folders():
        for page in pages(step):
            page.write_text(with_diff(page))


def pages(step: Path) -> list[Path]:
    found = [step / "README.md", step / "README.zh.md"]
    for page in found:
        if not page.exists():
            raise StepError(f"{page.relative_to(STEPS)} is missing")
    return found


def check() -> None:
    """Raises StepError with the first thing that does not hold."""
    for step in folders():
        for page in pages(step):
            if with_diff(page) != page.read_text():
                raise StepError(f"{page.relative_to(STEPS)} is stale; run steps.py readme")
        english, chinese = (page.read_text() for page in pages(step))
        if re.findall(r"^```.*?^```$", english, re.M | re.S) != re.findall(
            r"^```.*?^```$", chinese, re.M | re.S
        ):
            raise StepError(f"{step.name}: the two languages show different code")
        if (count := added_code(step)) > LARGEST:
            raise StepError(f"{step.name} adds {count} lines of code; at most {LARGEST}")
        for path in step.glob("*.py"):
            if re.search(r"^\s*(from|import) rosetrainer", path.read_text(), re.M):
                raise StepError(f"{step.name}/{path.name} imports the package")


def test(number: str) -> int:
    """The exit status of the step's own test."""
    step = find(number)
    (script,) = step.glob("test_*.py")
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(
        [sys.executable, script.name], cwd=step, env=environment, check=False
    ).returncode


def main(argv: list[str]) -> int:
    try:
        if argv == ["readme"]:
            readme()
        elif argv == ["check"]:
            check()
            for step in folders():
                print(f"{step.name}: {added_code(step)} added lines of code")
        elif len(argv) == 2 and argv[0] == "test":
            return test(argv[1])
        else:
            print(__doc__)
            return 0 if argv in ([], ["-h"], ["--help"]) else 2
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
