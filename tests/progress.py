"""What a run of many tests says: how many there are, how far it is, and at once what failed."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import pytest
from order import TESTS, lacking

PARTS = 20
"""Lines that tell how far it is."""


class Progress:
    """In place of dots, where pytest-xdist spreads the tests over workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager
        self._workers = config.getoption("numprocesses")
        self._tests = self._done = self._told = 0
        self._started = time.monotonic()
        self._root, self._seconds = config.rootpath, defaultdict[str, float](float)  # by file

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self._tests:
            self._tests = len(ids)
            self._say(f"{self._tests} tests by {self._workers} workers")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No letter for a test: what there is to say is said in lines."""
        if report.when != "call" and report.passed:
            return None
        if report.failed:
            return ("failed", "", "FAILED") if report.when == "call" else ("error", "", "ERROR")
        return report.outcome, "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say(f"FAILED {report.nodeid} ({report.when})")
        file = self._root / report.nodeid.partition("::")[0]
        if file.is_relative_to(TESTS):
            self._seconds[file.relative_to(TESTS).as_posix()] += report.duration
        self._done += report.when == "teardown"
        part = self._done * PARTS // max(self._tests, 1)
        if part > self._told:
            self._told = part
            minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
            done = f"{self._done:{len(str(self._tests))}} of {self._tests} tests"
            self._say(f"{100 * part // PARTS:4} %  {done}  {minutes}:{seconds:02}")

    def pytest_terminal_summary(self) -> None:
        for line in lacking(self._seconds):
            self._say(line)

    def _say(self, line: str) -> None:
        reporter: Any = self._plugins.getplugin("terminalreporter")
        reporter.write_line(line)
        reporter.flush()
