"""The guide: each edit is proven and each mistake is red, as its pages show, in one launch."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from once import Once
from ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "steps/guide_your_own_model"
OWN = ("dense", "model", "parity", "checkpoint")
LAST = ["edit 4"]  # the whole model; what leads there, its checkpoint and the mistakes run apart
OTHERS = [f"edit {n}" for n in (1, 2, 3, 5)] + [f"mistake {n}" for n in range(1, 6)]


def steps(*words: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "steps/steps.py", *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def imports_of(folder: Path) -> Iterator[None]:
    """Modules of the folder's names are the folder's."""
    for name in OWN:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def printed(folder: Path, script: str, rank: int) -> str:
    """What the script prints on this rank, and the error as it would be reported."""
    found = io.StringIO()
    with imports_of(folder), contextlib.redirect_stdout(found):
        from rosetrainer.launch.errors import RankError
        from rosetrainer.validation import ConfigError

        module = import_module(script)
        module.end_parallel = lambda: None  # type: ignore[attr-defined]  # one group for all
        try:
            module.main()
        except (RankError, ConfigError) as error:
            print(f"error: {error}")
    return found.getvalue()


def on_a_rank(made: dict[str, tuple[str, str]]) -> dict[str, str]:
    rank = int(os.environ["RANK"])
    return {name: printed(Path(folder), script, rank) for name, (folder, script) in made.items()}


def make_runs(names: list[str], folder: Path) -> dict[str, str]:
    """What rank 0 prints of these runs of the guide, all in one launch."""
    sys.path.insert(0, str(ROOT / "steps"))
    try:
        guide: Any = import_module("guide")
    finally:
        sys.path.remove(str(ROOT / "steps"))
    made = {}
    for name in names:
        kind, number = name.split()
        if kind == "edit":
            files, script = guide.after_edits(int(number)), guide.LAST if number == "5" else ""
        else:
            patch, files = guide.with_guide_mistake(int(number))
            script = guide.script_of(patch)
        own = folder / name.replace(" ", "_")
        own.mkdir()
        for file, text in files.items():
            (own / file).write_text(text)
        made[name] = (str(own), (script or "parity.py").removesuffix(".py"))
    return run_ranks(4, on_a_rank, made)[0]


def without_rounding(text: str) -> str:
    """What is left of rounding differs from machine to machine."""
    return re.sub(r"\d\.\de-1[2-9]|0\.0e\+00", "rounding", text)


def check_pages(name: str, printed: str) -> None:
    """Both pages show what the run printed."""
    for page in ("README.md", "README.zh.md"):
        block = rf"<!-- output: {name} -->\n```text\n(.*?)\n```\n<!-- /output -->"
        shown = re.search(block, (GUIDE / page).read_text(), re.DOTALL)
        assert shown
        assert without_rounding(printed).split() == without_rounding(shown[1]).split()
    assert ("error: " in printed) == name.startswith("mistake")


@pytest.mark.parametrize("name", LAST)
def test_the_last_edit_of_the_model_prints_what_the_pages_show(once: Once, name: str) -> None:
    check_pages(name, once("guide_last", partial(make_runs, LAST))[name])


@pytest.mark.mutant
@pytest.mark.parametrize("name", OTHERS)
def test_each_edit_is_proven_and_each_mistake_is_red_as_the_pages_show(
    once: Once, name: str
) -> None:
    check_pages(name, once("guide_others", partial(make_runs, OTHERS))[name])


def test_the_files_after_an_edit_are_given_and_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert steps("guide", "5", str(folder)).returncode == 0
    for name in ("dense.py", "model.py", "parity.py", "checkpoint.py"):
        assert (folder / name).read_bytes() == (GUIDE / name).read_bytes()
    for words, why in (
        (("guide", "1", str(folder)), f"{folder} is not empty; name a new folder"),
        (("guide", "6", str(tmp_path / "x")), "the guide has no edit 6; it can be 0 to 5"),
        (("guide", "break", "6"), "the guide has no mistake 6; it can be 1 to 5"),
    ):
        refused = steps(*words)
        assert (refused.returncode, refused.stderr) == (2, f"error: {why}\n")


@pytest.mark.parametrize(
    "file, old, new, why",
    [
        ("model.py", "stride=3", "stride=1", "guide_your_own_model/model.py is not dense.py after"),
        ("dense.py", "F.gelu", "F.relu", "guide_your_own_model/edit_1_mlp.patch does not apply"),
        ("mistake_2_no_stride.patch", "stride=3", "stride=9", "mistake_2_no_stride.patch does not"),
        ("README.md", "+        self.fc1", "+        self.fc3", "README.md is stale; run steps.py"),
        ("README.zh.md", "1e-10", "1e-11", "the guide's two languages show different figures"),
    ],
)
def test_check_fails_where_the_guide_no_longer_holds(
    tmp_path: Path, file: str, old: str, new: str, why: str
) -> None:
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "steps", tmp_path / "steps", ignore=skip)
    shutil.copytree(ROOT / "rosetrainer", tmp_path / "rosetrainer", ignore=skip)
    path = tmp_path / "steps/guide_your_own_model" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    refused = steps("check", "guide", root=tmp_path)
    assert refused.returncode == 2
    assert why in refused.stderr, refused.stderr
