"""Sides of a comparison, in turn on one machine: medians, a ratio, and a JSON of the run.

A side is a command whose last line of output is a JSON object of figures. Other work on the machine
comes and goes, so the sides alternate, and only the ratio of medians is a finding. Each round is a
fresh process, or, where one step is a round, the side's process stays.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "transformers")

LONGEST_SECONDS = 600.0

Figures = dict[str, Any]
Rounds = dict[str, list[Figures]]
Pairs = Mapping[str, tuple[str, str]]
"""By what they compare: the other side, ours."""
Ratio = Callable[[Rounds, str, str], float]


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
            try:
                stdout, stderr = process.communicate()
            except KeyboardInterrupt:
                process.kill()
                raise
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
    asks: str = ""

    def run(self) -> Figures:
        assert self.process.stdin
        if self.process.poll() is None:  # else its output has ended too
            self.process.stdin.write(f"{self.asks}\n")
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
    with suppress(KeyboardInterrupt):  # which the one who compares has had too
        for _ in sys.stdin:
            print(json.dumps(measure()), flush=True)


def in_turn(
    sides: Sequence[Runs],
    rounds: int,
    pairs: Pairs,
    longest: float = LONGEST_SECONDS,
    ratio: Ratio | None = None,
) -> Rounds:
    """Each side's figures, round by round; every second round begins at the other end.

    Shows each round with the ratio of each pair so far. Once a round is measured it says how long
    the others take, and begins none that would end after `longest` seconds. Ctrl-C or SIGTERM end
    it too, and what is there counts; KeyboardInterrupt is raised if that is no whole round.
    """
    found: Rounds = {side.name: [] for side in sides}
    began, done = time.monotonic(), 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while done < rounds:
            this = [(side.name, side.run()) for side in sides[:: -1 if done % 2 else 1]]
            for name, figures in this:
                found[name].append(figures)
            done += 1
            each = (time.monotonic() - began) / done
            most = max(done, int(min(longest / each, rounds)))  # longest may be inf
            of_pair = ratio or ratio_of
            ratios = [f"{name} {of_pair(found, *pair):.3f}" for name, pair in pairs.items()]
            left = f"{each * (most - done):.0f} s to go; Ctrl-C keeps what is there"
            told = [f"round {done} of {most}", *ratios, left if done < most else "done"]
            print(", ".join(told), file=sys.stderr, flush=True)
            if done == most < rounds:
                print(f"no more of the {rounds}: {longest:.0f} s are the most", file=sys.stderr)
                break
    except KeyboardInterrupt:
        if not done:
            raise
        print(f"stopped after {done} of {rounds} rounds", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    return found


def ratio_of(found: Rounds, theirs: str, ours: str) -> float:
    """How many times as fast ours is, by the medians of all rounds."""
    return median(found, theirs, "seconds") / median(found, ours, "seconds")


def paired_ratio(found: Rounds, theirs: str, ours: str) -> float:
    """As ratio_of, by the median of each round's own ratio: sides that ran beside each other."""
    pairs = zip(found[theirs], found[ours], strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)


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
