"""Mistakes that people really make, each as a patch: for each, the test that it names goes red.

A patch in tests/mutants/ begins with what is wrong and a line `Red: tests/FILE::TEST`. The test
runs in a copy of the tree with the patch applied; it must fail by an assertion, not by an error
that any broken file would raise. Without a patch the same way of running is green.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
PARTS = ("rosetrainer", "data", "tests", "pyproject.toml")


class Failures:
    """A pytest plugin that keeps the text of each failure, by test."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.texts[f"{report.when} of {report.nodeid}"] = str(report.longrepr)
        elif report.when == "call" and report.passed:
            self.passed += 1


def run_pytest_in(sender: Any, tree: str, test: str) -> None:
    """In a fresh process forked from one that has torch loaded, so that it costs no import.

    It forks its ranks itself, for it has run no torch operation; a second server costs seconds.
    """
    gc.freeze()
    ranks.FORKSERVER = multiprocessing.get_context("fork")  # type: ignore[assignment]
    os.chdir(tree)
    for name in ("CI", "BUILD_NUMBER"):  # with one, pytest takes minutes over long lists
        os.environ.pop(name, None)
    own = {str(ROOT), str(ROOT / "tests"), str(ROOT / "data")}
    for name in [name for name in sys.modules if name.partition(".")[0] == "rosetrainer"]:
        del sys.modules[name]
    sys.path[:] = [tree, f"{tree}/tests", f"{tree}/data", *(p for p in sys.path if p not in own)]
    failures = Failures()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loaded = "ignore:Module already imported"  # by the server, for all
        quick = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-W", loaded]
        pytest.main(["-q", "-x", *quick, test], plugins=[failures])
    sender.send((failures.passed, failures.texts))


def outcome(tree: Path, test: str) -> tuple[int, dict[str, str]]:
    """(tests passed, text of each failure) of `test` in the tree."""
    receiver, sender = ranks.FORKSERVER.Pipe(duplex=False)
    process = ranks.FORKSERVER.Process(target=run_pytest_in, args=(sender, str(tree), test))
    process.start()
    sender.close()
    assert receiver.poll(ranks.LONGEST_SECONDS), "no outcome"
    passed, texts = receiver.recv()
    process.join()
    return passed, texts


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the tests need, compiled as far as it is, without files being written."""
    skip = shutil.ignore_patterns("python-docs", "mutants", "*.pyc.*")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def named_test(patch: Path) -> str:
    found = re.search(r"^Red: (\S+)$", patch.read_text(), re.MULTILINE)
    assert found, f"{patch.name} names no test"
    return found[1]


@pytest.mark.mutant
@pytest.mark.parametrize("patch", MUTANTS, ids=lambda path: path.stem)
def test_the_mistake_turns_its_test_red(patch: Path, tree: Path) -> None:
    subprocess.run(["git", "apply", str(patch)], cwd=tree, check=True)
    passed, texts = outcome(tree, named_test(patch))
    assert texts, f"{named_test(patch)} stays green ({passed} passed)"
    (where, text), *_ = texts.items()
    assert where.startswith("call of "), f"broken, not wrong: {where}\n{text}"
    assert re.search(r"AssertionError|^E +assert |Failed: DID NOT", text, re.MULTILINE), text


def test_without_a_mistake_the_same_way_of_running_is_green(tree: Path) -> None:
    for name in ("layers", "model"):
        test = next(t for t in map(named_test, MUTANTS) if f"test_{name}.py" in t)
        passed, texts = outcome(tree, test)
        assert not texts, texts
        assert passed == 1


def test_there_is_a_patch_for_each_way_to_be_wrong_and_each_applies() -> None:
    assert len(MUTANTS) >= 60
    for patch in MUTANTS:
        check = ["git", "apply", "--check", str(patch)]
        done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"
