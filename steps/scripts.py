"""What a page's scripts import from the step's own files is there."""

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
