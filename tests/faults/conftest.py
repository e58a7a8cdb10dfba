"""The table that `make chaos` prints: how many trials of each fault passed, and the slowest."""

from __future__ import annotations

from typing import Any

from faults.harness import CHAOS

trials: dict[str, list[tuple[bool, float]]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" and "tests/faults/" in report.nodeid:
        file, _, test = report.nodeid.partition("::")
        name = f"{file.rpartition('/')[2]} {test.partition('[')[0]}"
        trials.setdefault(name, []).append((report.passed, report.duration))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not CHAOS:
        return
    terminalreporter.section("faults")
    for name, outcomes in trials.items():
        passed = sum(passes for passes, _ in outcomes)
        slowest = max(seconds for _, seconds in outcomes)
        line = f"{passed:4d} of {len(outcomes):4d}  slowest {slowest:5.1f} s  {name}"
        terminalreporter.write_line(line)
