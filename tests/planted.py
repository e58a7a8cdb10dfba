"""Tests in a copy of the tree, where a mistake is planted: what fails, and whether it is asserted.

A mistake counts as noticed where a test says what is wrong: an AssertionError, of the test or of
the program, or an error that was to be raised and was not. Another exception shows only that code
is broken, which whoever runs it sees without a test.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

import ranks

ROOT = Path(__file__).resolve().parent.parent
MOST_CPU_SECONDS = 200  # of a process: a loop that never ends is ended, however slow the machine
PARTS = ("rosetrainer", "data", "tests", "pyproject.toml")
ASSERTED = re.compile(r"AssertionError|^E +assert |Failed: DID NOT", re.MULTILINE)


class Outcome(NamedTuple):
    """What a run of tests gave. failures: the text of each, by where it failed, in order.

    collected: the names of all that were asked for, which `--collect-only` finds without a run.
    """

    passed: int
    failures: dict[str, str]
    collected: AbstractSet[str] = frozenset()

    @property
    def asserted(self) -> str | None:
        """Where an assertion failed."""
        return next((where for where, text in self.failures.items() if ASSERTED.search(text)), None)


class Failures:
    """A pytest plugin that keeps the text of each failure, and ends the run at an assertion."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.passed = 0
        self.collected: set[str] = set()
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_collection_finish(self, session: Any) -> None:
        self.collected = {item.nodeid for item in session.items}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.add(f"{report.when} of {report.nodeid}", str(report.longrepr))
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.add(f"import of {report.nodeid}", str(report.longrepr))

    def add(self, where: str, text: str) -> None:
        self.texts[where] = text
        if ASSERTED.search(text):
            self.session.shouldstop = "an assertion failed"


def run_pytest_in(sender: Any, tree: str, tests: list[str], most: int, seconds: float) -> None:
    """In a fresh process forked from one that has torch loaded, so that it costs no import.

    It forks its ranks itself, for it has run no torch operation; a second server costs seconds.
    """
    os.setsid()  # ended together with its ranks
    gc.freeze()
    ranks.FORKSERVER = multiprocessing.get_context("fork")  # type: ignore[assignment]
    ranks.LONGEST_SECONDS = seconds / 2
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS,) * 2)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    for name in ("CI", "BUILD_NUMBER"):  # with one, pytest takes minutes over long lists
        os.environ.pop(name, None)
    own = {str(ROOT), str(ROOT / "tests"), str(ROOT / "data")}
    for name in [name for name in sys.modules if name.partition(".")[0] == "rosetrainer"]:
        del sys.modules[name]
    sys.path[:] = [tree, f"{tree}/tests", f"{tree}/data", *(p for p in sys.path if p not in own)]
    import pytest

    failures = Failures()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loaded = "ignore:Module already imported"  # by the server, for all
        quick = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-W", loaded]
        pytest.main(["-q", f"--maxfail={most}", *quick, *tests], plugins=[failures])
    sender.send((failures.passed, failures.texts, failures.collected))


def run_tests(
    tree: Path, tests: list[str], most: int = 1, seconds: float = ranks.LONGEST_SECONDS
) -> Outcome | None:
    """Of `tests` in the tree, until an assertion or `most` tests fail; None after `seconds`."""
    receiver, sender = ranks.FORKSERVER.Pipe(duplex=False)
    arguments = (sender, str(tree), tests, most, seconds)
    process = ranks.FORKSERVER.Process(target=run_pytest_in, args=arguments)
    process.start()
    sender.close()
    outcome = None
    try:
        if receiver.poll(seconds):
            outcome = Outcome(*receiver.recv())
            process.join()
    except EOFError:
        outcome = Outcome(0, {"end of the process": "it died without a word"})
    finally:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return outcome


def copy_tree(target: Path) -> None:
    """What the tests need, compiled as far as it is, without files being written."""
    skip = shutil.ignore_patterns("python-docs", "mutants", "*.pyc.*")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, target / name)
