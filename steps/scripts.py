"""What a page's scripts import, and what its patches replace, is in the step's own files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ladder import StepError


def check_scripts(page: Path) -> None:
    """Raises StepError with the first name that a script of the page would not find."""
    step = page.parent
    for source in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S):
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a part of a function
            continue
        for node in body:
            file = step / f"{getattr(node, 'module', '')}.py"
            if not isinstance(node, ast.ImportFrom) or not file.exists():
                continue
            for alias in node.names:
                if alias.name not in names_in(file):
                    raise StepError(
                        f"{step.name}/{page.name} has a script that imports {alias.name} from "
                        f"{file.name}, which has none; write the file that it is in now, and run "
                        "the script: its output stands on the page"
                    )


def check_patches(page: Path) -> None:
    """Raises StepError with the first short patch (an exercise's) that no file of the step has.

    The step's own diff, with the names of its files, is written by `readme`.
    """
    sources = [file.read_text() for file in page.parent.glob("*.py")]
    for patch in re.findall(r"^```diff\n(.*?)^```$", page.read_text(), re.M | re.S):
        replaced = "".join(line[1:] for line in patch.splitlines(True) if line[0] in "- ")
        if patch.startswith("--- ") or not re.search(r"^-", patch, re.M):
            continue
        if not any(replaced in source for source in sources):
            raise StepError(
                f"{page.parent.name}/{page.name} has a patch to `{replaced.splitlines()[0].strip()}"
                "`, which no file of the step has; write it for the code as it is, and look whether"
                " its answer still holds"
            )


def names_in(file: Path) -> set[str]:
    """All that a module defines or imports at its top level."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        match node:
            case ast.Import() | ast.ImportFrom():
                found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            case ast.Assign():
                found |= {
                    name.id
                    for target in node.targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                }
            case ast.AnnAssign():
                found |= {node.target.id} if isinstance(node.target, ast.Name) else set()
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
    return found
