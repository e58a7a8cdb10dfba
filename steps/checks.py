"""What must hold of every step. A failure is one line: what is wrong, what to do, and why."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

from chinese import check_chinese
from curves import PAIRS
from guide import check_guide
from ladder import STEPS, StepError, added_code, find, folders, python_files
from pages import SECTIONS, heading, headings, pages, predictions, says, written_anew
from pictures.album import check_pictures
from scripts import check_patches, check_scripts
from upkeep import (
    ADDED_TO,
    CORE,
    PACKAGE,
    as_package,
    body_and_imports,
    definitions,
    last_with,
    propagate,
    with_mistake,
)

LARGEST = 200  # added lines of code
SHOWN = 60  # characters of a line
OPTIONAL = ("The maths", "Experiment")  # sections

LOGITS = """
import hashlib, sys
from importlib import import_module
import torch
for folder, *modules in (sys.argv[1:5], sys.argv[5:]):
    sys.path.insert(0, folder)
    config, model, sharding = map(import_module, modules)
    shape = dict(vocab_size=128, context_length=24, n_layers=3, n_heads=4, d_model=64)
    gpt = model.GPTModel(config.GPTConfig(**shape))
    sharding.init_weights(gpt, 3)
    ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(0))
    print(hashlib.sha256(gpt(ids)[0].detach().numpy().tobytes()).hexdigest(), flush=True)
"""


def check(which: str | None = None) -> list[Path]:
    """All of it, one step's own files and pages (its number), the `guide` or the `core` alone.

    Returns the steps that were looked at. Raises StepError with the first thing that does not hold.
    """
    steps = [] if which in ("core", "guide") else [find(which)] if which else folders()
    check_steps(steps)
    if which in (None, "guide"):
        check_guide()
    if which in (None, "core"):
        check_shared()
    return steps


def check_steps(steps: list[Path]) -> None:
    for step in steps:
        for path in sorted(step.glob("*.py")):
            check_source(path)
    for step in steps:
        pages(step)  # all are there: they link to each other
    for step in steps:
        check_step(step)
    check_chinese([step / "README.zh.md" for step in steps])
    check_pictures(steps)
    for step in steps:
        for page in pages(step):
            check_sections(page)
            check_scripts(page)
            check_patches(page)


def check_shared() -> None:
    """What no step has to itself: the other Chinese pages, and what the package shares."""
    root = STEPS.parent
    check_chinese([*STEPS.glob("*.zh.md"), *root.glob("*.zh.md"), *PACKAGE.rglob("*.zh.md")])
    for name, path in CORE.items():
        check_core(name, PACKAGE / path)
    for since, command in (("HEAD", "propagate"), ("HEAD~1", "propagate HEAD~1")):
        if path := propagate(write=False, since=since):
            raise StepError(
                f"{path[0]} lacks a change of its parent; run steps.py {command}: a fix in one "
                "step alone leaves the fault in those that grow out of it"
            )
    check_logits()


def check_source(path: Path) -> None:
    name, text = path.relative_to(STEPS), path.read_text()
    if "<<<<<<< " in text:
        raise StepError(
            f"{name} holds a conflict; mend it at <<<<<<<, then run steps.py propagate, which goes "
            "on from there"
        )
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise StepError(f"{name} line {error.lineno} is not Python: {error.msg}") from None
    if re.search(r"^\s*(from|import) rosetrainer", text, re.M):
        raise StepError(
            f"{name} imports the package; write what it needs into the step: a step is complete "
            "and runs from inside its own folder"
        )


def check_step(step: Path) -> None:
    for page in pages(step):
        if written_anew(page) != page.read_text():
            raise StepError(
                f"{page.relative_to(STEPS)} is stale; run steps.py readme: the diff and the code "
                "on a page are those of the files"
            )
    english, chinese = map(says, pages(step))
    for what in english:
        if english[what] != chinese[what]:
            raise StepError(
                f"{step.name}: the two languages show different {what}, "
                f"{first_difference(english[what], chinese[what])}; make README.md and "
                "README.zh.md equal there: both teach the same facts"
            )
    if (count := added_code(step)) > LARGEST:
        raise StepError(
            f"{step.name} adds {count} lines of code; at most {LARGEST}, so that a step is read in "
            "one sitting: leave out what is not its idea, or make two steps"
        )
    with_mistake(step)


def check_sections(page: Path) -> None:
    """The same headings in the same order on all pages, an answer for each prediction, an end."""
    name, found = page.relative_to(STEPS), headings(page)
    expected = {section: heading(section, page) for section in SECTIONS}
    here = [title for s, title in expected.items() if title in found or s not in OPTIONAL]
    if found != here:
        _, is_there, should = parting(found, here)
        raise StepError(
            f"{name} has the heading `{is_there}` where `{should}` belongs; all pages have the "
            "same ones in the same order (SECTIONS in steps/pages.py), so that a reader finds them"
        )
    asked, answered = predictions(page)
    if not asked or asked != answered:
        raise StepError(
            f"{name} asks {asked} predictions and answers {answered}; under "
            f"`{expected['Answers']}`, folded in <details>, each gets an answer in a numbered line"
        )
    text = page.read_text()
    marks = {"mine": "Write it yourself", "built": "What you have built"}
    if page.parent.name[:2] in PAIRS:
        marks["pair"] = "Exercises"
    for mark, section in marks.items():
        if f"<!-- {mark} -->\n" not in text or f"<!-- /{mark} -->" not in text:
            raise StepError(
                f"{name} has no lines <!-- {mark} --> and <!-- /{mark} -->; write them under "
                f"`{expected[section]}`, then run steps.py readme, which fills it in"
            )


def first_difference(english: Any, chinese: Any) -> str:
    """Of what two pages show, a list or a set of texts: where they part, and what stands there."""
    if isinstance(english, set):
        sides = [sorted(english - chinese), sorted(chinese - english)]
        return f"{' '.join(sides[0]) or 'nothing'} and {' '.join(sides[1]) or 'nothing'}"
    lines = ["\n".join(texts).split("\n") for texts in (english, chinese)]
    number, ours, theirs = parting(*lines)
    return f"in line {number} of them `{short(ours)}` and `{short(theirs)}`"


def parting(first: list[str], second: list[str]) -> tuple[int, str, str]:
    """The number of the first line that differs, counted from 1, and both; "nothing" at an end."""
    pairs = enumerate(zip_longest(first, second, fillvalue="nothing"), 1)
    return next((n, a.strip(), b.strip()) for n, (a, b) in pairs if a != b)


def short(line: str) -> str:
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def check_core(name: str, package: Path) -> None:
    """The last step that has the file, against the package's."""
    having = [step for step in folders() if name in python_files(step)]
    here = package.relative_to(PACKAGE).as_posix()
    if not having or not package.exists():
        missing = f"rosetrainer/{here}" if having else f"steps/*/{name}"
        raise StepError(
            f"{missing} is not there; CORE in steps/upkeep.py names it as code that the steps and "
            "the package share: give it its new name"
        )
    origin = last_with(name)
    sources = as_package(origin.read_text()), package.read_text()
    if here in ADDED_TO:
        taught, known = map(definitions, sources)
        sources = "\n".join(taught.values()), "\n".join(known.get(d, "") for d in taught)
    (ours, used), (theirs, imported) = map(body_and_imports, sources)
    if (ours, used) == (theirs, imported):
        return
    what = f"{origin.relative_to(STEPS)} is not the package's {here}"
    why = "then run steps.py propagate and readme: what a step teaches is what the package does"
    if ours == theirs:
        which = sorted(used ^ imported)[0].replace("None", "").strip()
        raise StepError(f"{what}: only one of them imports {which}; make them equal, {why}")
    _, line, other = parting(ours.splitlines(), theirs.splitlines())
    texts = {step: as_package((step / name).read_text()) for step in having}
    first = next((step for step in having if line in texts[step]), origin.parent)
    raise StepError(
        f"{what}: `{short(line)}` against `{short(other)}`; change it in {first.name}, the first "
        f"step that has the line, {why}"
    )


def check_logits() -> None:
    """Of step 09 and the package, bitwise: outside the core too, nothing computes otherwise."""
    names = ("config", "models.gpt", "parallel.sharding")
    sides = [
        (PACKAGE.parent, *(f"rosetrainer.{name}" for name in names)),
        (find("09"), "config", "model", "tensor_parallel"),
    ]
    words = [str(word) for side in sides for word in side]
    command = [sys.executable, "-c", LOGITS, *words]  # one process: importing torch takes seconds
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    digests = done.stdout.split()
    if done.returncode:
        folder, _, model, _ = sides[len(digests)]
        last = done.stderr.strip().rpartition("\n")[2]
        raise StepError(f"{model} in {folder.name} makes no logits: {last}")
    if digests[0] != digests[1]:
        raise StepError(
            "step 09 and the package compute different logits; a default or an initial weight "
            "has changed outside the core (config.py, models/): take it back, or change it in the "
            "steps too: their pages show the package's numbers"
        )
