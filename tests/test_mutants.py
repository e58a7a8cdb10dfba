"""Mistakes that people really make, each as a patch: for each, the test that it names goes red.

A patch in tests/mutants/ begins with what is wrong and a line `Red: tests/FILE::TEST`. The test
runs in a copy of the tree with the patch applied; it must fail by an assertion, not by an error
that any broken file would raise. Without a patch the same way of running is green.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from planted import ROOT, copy_tree, run_tests

MUTANTS = sorted((ROOT / "tests" / "mutants").glob("*.patch"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    copy_tree(tmp_path)
    return tmp_path


def named_test(patch: Path) -> str:
    found = re.search(r"^Red: (\S+)$", patch.read_text(), re.MULTILINE)
    assert found, f"{patch.name} names no test"
    return found[1]


@pytest.mark.mutant
@pytest.mark.parametrize("patch", MUTANTS, ids=lambda path: path.stem)
def test_the_mistake_turns_its_test_red(patch: Path, tree: Path) -> None:
    subprocess.run(["git", "apply", str(patch)], cwd=tree, check=True)
    outcome = run_tests(tree, [named_test(patch)])
    assert outcome, "no outcome"
    assert outcome.failures, f"{named_test(patch)} stays green ({outcome.passed} passed)"
    (where, text), *_ = outcome.failures.items()
    assert where.startswith("call of "), f"broken, not wrong: {where}\n{text}"
    assert outcome.asserted == where, text


def test_without_a_mistake_the_same_way_of_running_is_green(tree: Path) -> None:
    for name in ("layers", "model"):
        test = next(t for t in map(named_test, MUTANTS) if f"test_{name}.py" in t)
        outcome = run_tests(tree, [test])
        assert outcome, "no outcome"
        assert not outcome.failures, "\n".join(outcome.failures.values())
        assert outcome == (1, {}, {test})


def test_there_is_a_patch_for_each_way_to_be_wrong_and_each_applies() -> None:
    assert len(MUTANTS) >= 60
    for patch in MUTANTS:
        check = ["git", "apply", "--check", str(patch)]
        done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"
