"""The steps: each one's own test, and what steps.py keeps; each thing that it keeps can fail."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

STEPS = Path(__file__).resolve().parent.parent / "steps"
NUMBERS = sorted(path.name for path in STEPS.glob("[0-9][0-9]_*"))


def load(folder: Path) -> ModuleType:
    """steps.py of that folder; it looks at the steps beside it."""
    spec = importlib.util.spec_from_file_location("steps_tool", folder / "steps.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(STEPS, tmp_path / "steps", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "steps"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("step", NUMBERS)
def test_the_step_s_own_test_is_green(step: str) -> None:
    done = run(STEPS.parent, "steps/steps.py", "test", step)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_check_keeps_holds() -> None:
    done = run(STEPS.parent, "steps/steps.py", "check")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == NUMBERS


def test_readme_changes_nothing_in_the_present_tree(copy: Path) -> None:
    before = {page: page.read_text() for page in copy.glob("*/README*.md")}
    load(copy).readme()
    assert {page: page.read_text() for page in copy.glob("*/README*.md")} == before


def refused(copy: Path) -> str:
    tool = load(copy)
    with pytest.raises(tool.StepError) as caught:
        tool.check()
    return str(caught.value)


def test_check_fails_on_a_stale_diff(copy: Path) -> None:
    path = copy / "02_loss_and_train_loop" / "data.py"
    path.write_text(path.read_text() + "\nEXTRA = 1\n")
    assert refused(copy) == "02_loss_and_train_loop/README.md is stale; run steps.py readme"


def test_check_fails_on_two_hundred_lines_of_code_but_not_of_comments(copy: Path) -> None:
    path = copy / "02_loss_and_train_loop" / "data.py"
    source = path.read_text()
    path.write_text(source + "\n# a comment\n\n" * 200)
    load(copy).readme()
    load(copy).check()
    path.write_text(source + "".join(f"A{n} = {n}\n" for n in range(200)))
    load(copy).readme()
    assert "02_loss_and_train_loop adds 2" in refused(copy)


def test_check_fails_on_an_import_of_the_package(copy: Path) -> None:
    path = copy / "00_two_ranks" / "two_ranks.py"
    path.write_text(path.read_text().replace("import sys\n", "import sys\nimport rosetrainer\n", 1))
    load(copy).readme()
    assert refused(copy) == "00_two_ranks/two_ranks.py imports the package"


def test_check_fails_where_the_languages_differ_or_one_is_missing(copy: Path) -> None:
    page = copy / "01_minimal_gpt" / "README.zh.md"
    page.write_text(page.read_text().replace("python train.py", "python trian.py", 1))
    assert refused(copy) == "01_minimal_gpt: the two languages show different code"
    page.unlink()
    assert refused(copy) == "01_minimal_gpt/README.zh.md is missing"


def test_an_unknown_step_is_one_line() -> None:
    done = run(STEPS.parent, "steps/steps.py", "test", "77")
    assert done.returncode == 2
    assert done.stderr == "error: there is no step 77; it can be 00, 01, 02\n"


def test_a_step_that_needs_torchrun_says_so() -> None:
    done = run(STEPS / "00_two_ranks", "two_ranks.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: one process has nobody to talk to; start two: OMP_NUM")
    assert done.stderr.count("\n") == 1
