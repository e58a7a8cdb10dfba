"""The guide: a model that is no GPT, tensor-parallel in five edits; steps.py is the command."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from chinese import check_chinese
from ladder import STEPS, StepError
from pages import says, with_excerpts
from tries import capture
from upkeep import apply_patch

GUIDE = STEPS / "guide_your_own_model"
LAST = "checkpoint.py"  # the fifth edit is this file
PAGES = (GUIDE / "README.md", GUIDE / "README.zh.md")
GIVEN = ("dense.py", "parity.py")


def patches(kind: str) -> list[Path]:
    """Of "edit" or "mistake", in their order."""
    return sorted(GUIDE.glob(f"{kind}_*.patch"))


def after_edits(count: int) -> dict[str, str]:
    """dense.py, parity.py and the model after its first edits, by name."""
    if not 0 <= count <= len(patches("edit")) + 1:
        raise StepError(f"the guide has no edit {count}; it can be 0 to {len(patches('edit')) + 1}")
    files = {name: (GUIDE / name).read_text() for name in GIVEN}
    files["model.py"] = files["dense.py"]
    for patch in patches("edit")[:count]:
        files = apply_patch(patch, files)
    if count > len(patches("edit")):
        files[LAST] = (GUIDE / LAST).read_text()
    return files


def with_guide_mistake(number: int) -> tuple[Path, dict[str, str]]:
    """A mistake's patch, and all files with it applied."""
    found = patches("mistake")
    if not 1 <= number <= len(found):
        raise StepError(f"the guide has no mistake {number}; it can be 1 to {len(found)}")
    patch = found[number - 1]
    return patch, apply_patch(patch, after_edits(len(patches("edit")) + 1))


def start_guide(count: int, folder: Path) -> None:
    files = after_edits(count)
    if folder.exists() and any(folder.iterdir()):
        raise StepError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    print(f"{folder}: {', '.join(sorted(files))}, after {count} of 5 edits")


def ran(files: dict[str, str], script: str) -> tuple[int, str]:
    """The exit status of a script among the files, and what it prints."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in files.items():
            (Path(scratch) / name).write_text(text)
        path = os.pathsep.join([str(STEPS.parent), os.environ.get("PYTHONPATH", "")])
        words = ["env", f"PYTHONPATH={path}", sys.executable, script]
        done = capture(words, Path(scratch))
        return done.returncode, done.stdout + done.stderr


def script_of(patch: Path) -> str:
    """What shows a mistake: the file that it changes, or the proof of the model."""
    return LAST if f"b/{LAST}" in patch.read_text() else "parity.py"


def break_guide(number: int) -> int:
    """Prints a mistake and what its command prints; 0 if that turns red."""
    patch, files = with_guide_mistake(number)
    print(patch.read_text())
    status, printed = ran(files, script_of(patch))
    print(printed, end="")
    return 0 if status else 1


def runs() -> dict[str, str]:
    """What each command of the guide prints, by the mark of its block on the pages."""
    found = {}
    for count in range(1, len(patches("edit")) + 1):
        found[f"edit {count}"] = ran(after_edits(count), "parity.py")[1]
    found[f"edit {count + 1}"] = ran(after_edits(count + 1), LAST)[1]
    for number in range(1, len(patches("mistake")) + 1):
        patch, files = with_guide_mistake(number)
        found[f"mistake {number}"] = ran(files, script_of(patch))[1]
    return found


def written_guide(text: str, printed: dict[str, str]) -> str:
    """A page with its diffs from the patches, and what its commands print where that is given."""

    def diff_block(match: re.Match[str]) -> str:
        patch = patches(match[2])[int(match[3]) - 1].read_text()
        return f"{match[1]}```diff\n{patch[patch.index('---') :]}```\n{match[4]}"

    def output_block(match: re.Match[str]) -> str:
        return f"{match[1]}```text\n{printed[match[2]].rstrip()}\n```\n{match[3]}"

    marked = r"(<!-- diff: (edit|mistake) (\d) -->\n).*?(<!-- /diff -->)"
    text = re.sub(marked, diff_block, with_excerpts(text, GUIDE), flags=re.DOTALL)
    if printed:
        marked = r"(<!-- output: (\w+ \d) -->\n).*?(<!-- /output -->)"
        text = re.sub(marked, output_block, text, flags=re.DOTALL)
    return text


def write_guide() -> None:
    """Runs all that the guide shows, which takes minutes, and writes it on both pages."""
    printed = runs()
    for page in PAGES:
        page.write_text(written_guide(page.read_text(), printed))


def check_guide() -> None:
    """Raises StepError if an edit or a mistake does not apply, or a page is stale, or differs."""
    model = after_edits(len(patches("edit")))["model.py"]
    if model != (GUIDE / "model.py").read_text():
        raise StepError(
            "guide_your_own_model/model.py is not dense.py after the edits; make the change in the "
            "edit that has the line too: the guide shows the edits, and tests run the model"
        )
    for number in range(1, len(patches("mistake")) + 1):
        with_guide_mistake(number)
    for page in PAGES:
        if written_guide(page.read_text(), {}) != page.read_text():
            raise StepError(
                f"{page.relative_to(STEPS)} is stale; run steps.py readme guide: its diffs are the "
                "patches"
            )
    english, chinese = map(says, PAGES)
    for what in english:
        if english[what] != chinese[what]:
            raise StepError(
                f"the guide's two languages show different {what}; make README.md and README.zh.md "
                "equal there: both teach the same facts"
            )
    check_chinese([PAGES[1]])
