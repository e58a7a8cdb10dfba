"""Sides of a comparison, in turn on one machine: medians, a ratio, and a JSON of the run.

A side is a command whose last line of output is a JSON object of figures. Other work on the machine
comes and goes, so the sides alternate, each round is a fresh process, and only the ratio of medians
is a finding.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "transformers")

Rounds = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Side:
    """A command, without the interpreter, and the environment variables that it needs."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """The figures of one fresh process. Raises SystemExit, with its output, if it fails."""
        command = [sys.executable, *self.arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {self.name}: status {done.returncode}\n{done.stdout}{done.stderr}")
        figures = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(figures, dict)
        return figures


def in_turn(sides: Sequence[Side], rounds: int) -> Rounds:
    """Each side's figures, round by round; every second round begins at the other end."""
    found: Rounds = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            found[side.name].append(side.run())
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def median(found: Rounds, side: str, figure: str) -> float:
    return statistics.median(figures[figure] for figures in found[side])


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def keep(
    benchmark: str,
    ratio: float,
    wanted: float,
    found: Mapping[str, Any],
    at_most: bool = False,
    **more: Any,
) -> Path:
    """Writes the run's JSON to benchmarks/results, prints where, and gives its path.

    The ratio should be `wanted` or more, or with at_most, or less.
    """
    now = datetime.now(timezone.utc)
    path = RESULTS / f"{benchmark}-{now:%Y%m%d-%H%M%S}.json"
    RESULTS.mkdir(exist_ok=True)
    run = {
        "benchmark": benchmark,
        "ratio": round(ratio, 4),
        "wanted": round(wanted, 4),
        "at most": at_most,
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "machine": machine(),
        "flags": sys.argv[1:],
        **more,
        "figures": found,
    }
    path.write_text(json.dumps(run, indent=1) + "\n")
    reached = "reached" if (ratio <= wanted if at_most else ratio >= wanted) else "NOT reached"
    bound = f"at most {wanted:.3g}" if at_most else f"{wanted:.3g}"
    print(f"{benchmark}: ratio {ratio:.2f}, wanted {bound}: {reached}; {shown(path)}")
    return path


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def introduce(flags: str) -> None:
    """The machine, the versions and the flags, in one line."""
    facts = machine()
    processor_name, cores = facts.pop("processor"), facts.pop("cores")
    rest = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "system")
    print(f"{processor_name}, {cores} cores, {facts['system']}; {rest}; {flags}")
