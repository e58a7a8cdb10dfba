"""Sides of a comparison, in turn on one machine: medians, a ratio, and a JSON of the run.

A side is a command whose last line of output is a JSON object of figures. Other work on the machine
comes and goes, so the sides alternate, and only the ratio of medians is a finding. Each round is a
fresh process, or, where one step is a round, the side's process stays.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "transformers")

Figures = dict[str, Any]
Rounds = dict[str, list[Figures]]


class Runs(Protocol):
    """What makes a round."""

    @property
    def name(self) -> str: ...

    def run(self) -> Figures: ...


@dataclass(frozen=True)
class Side:
    """A command, without the interpreter, and the environment variables that it needs."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, **pipes: Any) -> subprocess.Popen[str]:
        """Its process; pipes: what Popen takes them by."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}
        command = [sys.executable, *self.arguments]
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def run(self) -> Figures:
        """The figures of one fresh process. Raises SystemExit, with its output, if it fails."""
        with self.start(stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            stdout, stderr = process.communicate()
        if process.returncode:
            sys.exit(f"error: {self.name}: status {process.returncode}\n{stdout}{stderr}")
        figures = json.loads(stdout.splitlines()[-1])
        assert isinstance(figures, dict)
        return figures


@dataclass(frozen=True)
class StayingSide:
    """A side that was set up once: `answer` in its process makes each round."""

    name: str
    process: subprocess.Popen[str]

    def run(self) -> Figures:
        assert self.process.stdin
        if self.process.poll() is None:  # else its output has ended too
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.figures()

    def figures(self) -> Figures:
        """The next line that its process prints. Raises SystemExit if that has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.name}: status {self.process.wait()}")
        figures = json.loads(line)
        assert isinstance(figures, dict)
        return figures


@contextmanager
def staying(sides: Sequence[Side]) -> Iterator[list[StayingSide]]:
    """The sides, each set up after the other: nothing else goes on while one is measured."""
    with ExitStack() as stack:
        ready = []
        for side in sides:
            process = side.start(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            ready.append(StayingSide(side.name, stack.enter_context(process)))
            ready[-1].figures()
        yield ready


def answer(measure: Callable[[], Figures]) -> None:
    """What a process that stays does: a line of figures for each line of its input."""
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def in_turn(sides: Sequence[Runs], rounds: int) -> Rounds:
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
