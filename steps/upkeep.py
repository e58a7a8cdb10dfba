"""How a fix flows from a step to the next ones and to the package; steps.py is the command."""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from pathlib import Path

from ladder import STEPS, StepError, folders, parent, python_files, read

PACKAGE = STEPS.parent / "rosetrainer"
CORE = {  # a step's file, and the package's that is the same code
    "comm.py": "parallel/comm.py",
    "parallel_context.py": "parallel/context.py",
    "sharding.py": "parallel/sharding.py",
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
    "split_backward.py": "parallel/pipeline/split_backward.py",
    "data_parallel.py": "parallel/data_parallel.py",
    "zero_cut.py": "parallel/zero/cut.py",
    "zero_unit.py": "parallel/zero/unit.py",
    "sharded_model.py": "parallel/zero/sharded_model.py",
}
ADDED_TO = ("optim/non_finite.py",)  # the package's has more functions than the step's
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


def with_mistake(step: Path) -> dict[str, str]:
    """The step's files by name with its mistake.patch applied. Raises StepError if it does not."""
    patch = step / "mistake.patch"
    if not patch.exists():
        raise StepError(
            f"{step.name}/mistake.patch is missing; say what is wrong in its first paragraph, and "
            "under it `git diff --relative` of a mistake that the step's test catches: readers "
            "plant it with steps.py break"
        )
    return apply_patch(patch, {name: (step / name).read_text() for name in python_files(step)})


def apply_patch(patch: Path, files: dict[str, str]) -> dict[str, str]:
    """The files by name with the patch applied. Raises StepError if it does not fit them."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        done = git("apply", str(patch), cwd=Path(folder))
        if done.returncode:
            reason = done.stderr.partition("\n")[0].removeprefix("error: ")
            raise StepError(
                f"{patch.parent.name}/{patch.name} does not apply: {reason}; make its change once "
                "more, write `git diff --relative` under the patch's first paragraph, and take it "
                "back: readers try it with steps.py"
            )
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
    named = git("diff", "--name-only", "--relative", since).stdout.splitlines()
    differ = {STEPS / name for name in named}
    for origin, file in pairs:
        if origin not in differ:
            continue
        to = as_package if PACKAGE in file.parents else str
        base = committed(origin, since)
        theirs = origin.read_text() if origin.exists() else None
        if base is None:  # a new file enters by its own step
            continue
        carried = None if theirs is None else to(theirs)
        if merge(file, to(base), carried, origin.parent.name, write):
            differ.add(file)
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
