"""What holds of every step, and how a fix flows from one to the next; steps.py is the command."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ladder import STEPS, StepError, added_code, find, folders, parent, python_files, read
from pages import pages, says, written_anew
from pictures.album import check_pictures

PACKAGE = STEPS.parent / "rosetrainer"
LARGEST = 200  # added lines of code
CORE = {  # a step's file, and the package's that is the same code
    "comm.py": "parallel/comm.py",
    "parallel_context.py": "parallel/context.py",
    "tensor_parallel.py": "parallel/tensor_parallel.py",
    "model.py": "models/gpt.py",
    "clip.py": "optim/clip.py",
    "vocab_parallel.py": "parallel/vocab_parallel.py",
    "dropout.py": "parallel/dropout.py",
    "attention.py": "models/attention.py",
    "recompute.py": "parallel/recompute.py",
    "precision.py": "optim/precision.py",
    "non_finite.py": "optim/non_finite.py",
    "overlap.py": "parallel/overlap.py",
}
ADDED_TO = (
    "optim/non_finite.py",
)  # the package's has more functions; those of the step are its own
MERGED = STEPS / ".propagate"  # conflicts that were handed to a person, until all is merged


def as_package(source: str) -> str:
    """A step's module as the package would import."""
    start = "init_process_group"  # which a step has in environment.py
    there = rf"from environment import \1\nfrom rosetrainer.launch.process_group import {start}"
    source = re.sub(rf"^from environment import {start}, (.*)$", there, source, flags=re.M)
    for name, path in (CORE | {name: name for name in ("config.py", "environment.py")}).items():
        module = path.removesuffix(".py").replace("/", ".")
        line = rf"^from {name.removesuffix('.py')} import"
        source = re.sub(line, f"from rosetrainer.{module} import", source, flags=re.M)
    return source


def body_and_imports(source: str) -> tuple[str, set[str]]:
    """The text without its imports, and what they import: their order differs from ours."""
    lines, imported = source.splitlines(), set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None)
            imported |= {f"{module} {alias.name} {alias.asname}" for alias in node.names}
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)), imported


def definitions(source: str) -> dict[str, str]:
    """The text of each class and function of a module, by name."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    return {node.name: ast.get_source_segment(source, node) or "" for node in found}


def last_with(name: str) -> Path:
    return [step / name for step in folders() if (step / name).exists()][-1]


LOGITS = """
import hashlib, sys
from importlib import import_module
folder, *modules = sys.argv[1:]
sys.path.insert(0, folder)
config, model, tp = map(import_module, modules)
import torch
shape = dict(vocab_size=128, context_length=24, n_layers=3, n_heads=4, d_model=64)
gpt = model.GPTModel(config.GPTConfig(**shape))
tp.init_weights(gpt, 3)
ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(0))
print(hashlib.sha256(gpt(ids)[0].detach().numpy().tobytes()).hexdigest())
"""


def logits_digest(folder: Path, config: str, model: str, tensor_parallel: str) -> str:
    """A hash of a GPT's logits, made by these modules in the folder."""
    command = [sys.executable, "-c", LOGITS, str(folder), config, model, tensor_parallel]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check() -> None:
    """Raises StepError with the first thing that does not hold."""
    for path in sorted(STEPS.glob("*/*.py")):
        if "<<<<<<< " in path.read_text():
            raise StepError(f"{path.relative_to(STEPS)} holds a conflict; mend it at <<<<<<<")
    for step in folders():
        for page in pages(step):
            if written_anew(page) != page.read_text():
                raise StepError(f"{page.relative_to(STEPS)} is stale; run steps.py readme")
        english, chinese = map(says, pages(step))
        for what in english:
            if english[what] != chinese[what]:
                raise StepError(f"{step.name}: the two languages show different {what}")
        if (count := added_code(step)) > LARGEST:
            raise StepError(f"{step.name} adds {count} lines of code; at most {LARGEST}")
        for path in step.glob("*.py"):
            if re.search(r"^\s*(from|import) rosetrainer", path.read_text(), re.M):
                raise StepError(f"{step.name}/{path.name} imports the package")
        with_mistake(step)
    check_pictures()
    for name, path in CORE.items():
        ours, packaged = as_package(last_with(name).read_text()), (PACKAGE / path).read_text()
        if path in ADDED_TO:
            same = definitions(ours).items() <= definitions(packaged).items()
        else:
            same = body_and_imports(ours) == body_and_imports(packaged)
        if not same:
            raise StepError(f"{last_with(name).relative_to(STEPS)} is not the package's {path}")
    for since in ("HEAD", "HEAD~1"):
        if path := propagate(write=False, since=since):
            raise StepError(f"{path[0]} lacks a change of its parent; run steps.py propagate")
    names = ("config", "models.gpt", "parallel.tensor_parallel")
    digest = logits_digest(PACKAGE.parent, *(f"rosetrainer.{name}" for name in names))
    if logits_digest(find("09"), "config", "model", "tensor_parallel") != digest:
        raise StepError("step 09 and the package compute different logits")


def with_mistake(step: Path) -> dict[str, str]:
    """The step's files by name with its mistake.patch applied. Raises StepError if it does not."""
    patch = step / "mistake.patch"
    with tempfile.TemporaryDirectory() as folder:
        for name in python_files(step):
            (Path(folder) / name).write_text((step / name).read_text())
        done = git("apply", str(patch), cwd=Path(folder))
        if done.returncode:
            reason = done.stderr.partition("\n")[0].removeprefix("error: ")
            raise StepError(f"{step.name}/mistake.patch does not apply: {reason}")
        return {path.name: path.read_text() for path in Path(folder).glob("*.py")}


def git(*arguments: str, cwd: Path = STEPS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def committed(file: Path, commit: str) -> str | None:
    """The file as it was in the commit; None if it was not there."""
    shown = git("show", f"{commit}:./{file.relative_to(STEPS)}")
    return None if shown.returncode else shown.stdout


def propagate(write: bool = True, since: str = "HEAD") -> list[str]:
    """Carries what changed in a step since a commit to those that grow out of it, the core to us.

    Returns the files that changed, or would. Raises StepError at a conflict, with what to do;
    without `write`, a conflict is not judged: the file may hold the change in its own way.
    """
    changed = []
    pairs = [
        (origin / name, step / name)
        for step in folders()
        if (origin := parent(step))
        for name in python_files(origin, step)
    ]
    pairs += [(last_with(name), PACKAGE / path) for name, path in CORE.items()]
    for origin, file in pairs:
        to = as_package if PACKAGE in file.parents else str
        base = committed(origin, since)
        theirs = origin.read_text() if origin.exists() else None
        if base == theirs or base is None:  # unchanged, or new: a file enters by its own step
            continue
        carried = None if theirs is None else to(theirs)
        if merge(file, to(base), carried, origin.parent.name, write):
            changed.append(str(file.relative_to(STEPS.parent)))
    if write:
        MERGED.unlink(missing_ok=True)
    return changed


def merge(file: Path, base: str, theirs: str | None, origin: str, write: bool) -> bool:
    """Whether `file` differs, or would, once base -> theirs is carried into it."""
    if not file.exists() or theirs is None:
        return False  # a step that dropped the file, or a parent that did: nothing flows
    ours = file.read_text()
    handed = f"{file.as_posix()}\n" in read(MERGED)
    if handed and "<<<<<<<" not in ours:
        return False
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "base", "theirs")]
        for path, text in zip(paths, (ours, base, theirs), strict=True):
            path.write_text(text)
        names = (file.parent.name, f"{origin}, committed", origin)
        labels = [word for name in names for word in ("-L", name)]
        done = git("merge-file", "-p", *labels, *map(str, paths))
    conflict = done.returncode != 0
    if conflict and write:
        with MERGED.open("a") as note:
            note.write(f"{file.as_posix()}\n")
        if not handed:
            file.write_text(done.stdout)
        where = file.relative_to(STEPS.parent)
        raise StepError(f"conflict in {where}; mend it at <<<<<<<, then run propagate again")
    if conflict or done.stdout == ours:
        return False
    if write:
        file.write_text(done.stdout)
    return True
