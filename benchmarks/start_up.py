"""Start-up: from the command to the first loss, against what torch alone takes to start.

python benchmarks/start_up.py

Two ranks against two processes that import torch and start a gloo process group; one process
against `import torch`; and what starts the ranks, alone. In turn; then the imports of ours that
torch does not make, the heaviest first.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import ROOT, Rounds, Side, in_turn, introduce, keep, median
from rosetrainer.commands.flags import parse_flags
from rosetrainer.launch.rank import run_rank
from rosetrainer.validation import Count

WANTED = 1.1
MODEL = ["--n-layers", "1", "--d-model", "32", "--n-heads", "2", "--context-length", "16"]
SHORT = [
    *("--global-batch-size", "4", "--steps", "1", "--eval-tokens", "64"),
    *("--device", "cpu", "--resume", "never"),
]
MEET = """
import sys
import torch
import torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
print("ready", flush=True)
sys.stdin.read()  # until all are: one that ended would break the connections that others make
dist.destroy_process_group()
"""
IMPORT = "import torch; print('ready', flush=True)"
LAUNCHER = "import rosetrainer.__main__, rosetrainer.commands.train; print('ready', flush=True)"
MARKS = {"first line": "", "model made": " parameters on this rank", "first loss": "  loss "}
"""What stands in the line of our output that ends a stage, in their order."""


@dataclass(frozen=True)
class StartUp:
    """Measures the time to the first loss."""

    rounds: Count = 5
    """Rounds of each side, in turn."""
    top: Count = 8
    """Imports shown."""


def train_command(folder: Path, ranks: int) -> list[str]:
    many = ["--nproc", str(ranks)] if ranks > 1 else []
    places = ["--data", str(folder / "markov"), "--out", str(folder / f"run-{time.time_ns()}")]
    return ["-m", "rosetrainer", "train", *many, *MODEL, *SHORT, *places]


def ours(folder: Path, ranks: int) -> dict[str, Any]:
    """Seconds from the command to each mark; "seconds" is the last."""
    started = time.perf_counter()
    command = [sys.executable, *train_command(folder, ranks)]
    reached: dict[str, float] = {}
    marks = list(MARKS.items())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            while marks and marks[0][1] in line:
                reached[marks.pop(0)[0]] = time.perf_counter() - started
    if process.returncode or marks:
        sys.exit(f"error: status {process.returncode}, and no line with {marks[:1]}")
    return {"seconds": reached["first loss"], "marks": reached}


def ready(folder: Path, script: str, processes: int) -> dict[str, Any]:
    """Seconds until each of the processes that run the script has said that it is ready."""
    store = str(folder / f"store-{time.time_ns()}")
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), store],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            sys.exit("error: a process did not start")
    seconds = time.perf_counter() - started
    for process in running:
        process.communicate()
    return {"seconds": seconds}


SIDES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ours, 2 ranks": lambda folder: ours(folder, 2),
    "torch and gloo, 2 processes": lambda folder: ready(folder, MEET, 2),
    "ours, one process": lambda folder: ours(folder, 1),
    "import torch": lambda folder: ready(folder, IMPORT, 1),
    "import what starts the ranks": lambda folder: ready(folder, LAUNCHER, 1),
}
PAIRS = {
    "start-up-2-ranks": ("torch and gloo, 2 processes", "ours, 2 ranks"),
    "start-up-one-process": ("import torch", "ours, one process"),
}


def import_seconds(arguments: Sequence[str]) -> dict[str, float]:
    """Each module that a command imports, and the seconds of that module alone."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
    return {module: int(microseconds) / 1e6 for microseconds, module in lines}


def extra_imports(folder: Path) -> dict[str, float]:
    """Seconds by package of what one process of ours imports until its end, and torch does not."""
    of_torch = import_seconds(["-c", "import torch, torch.distributed"])
    packages: dict[str, float] = {}
    for module, seconds in import_seconds(train_command(folder, 1)).items():
        if module not in of_torch:
            parts = module.split(".")
            package = ".".join(parts[:2]) if parts[0] == "torch" else parts[0]
            packages[package] = packages.get(package, 0.0) + seconds
    return dict(sorted(packages.items(), key=lambda item: -item[1]))


def print_start_up(found: Rounds, extra: dict[str, float], top: int) -> None:
    for name in found:
        print(f"  {name:32} {median(found, name, 'seconds'):5.2f} s")
        marked = [figures["marks"] for figures in found[name] if "marks" in figures]
        since = 0.0
        for mark in MARKS if marked else ():
            at = median({name: marked}, name, mark)
            print(f"    to the {mark:27} {at - since:5.2f} s")
            since = at
    print(f"imports of ours that torch does not make, {sum(extra.values()):.2f} s; the heaviest:")
    for package, seconds in list(extra.items())[:top]:
        print(f"  {package:32} {seconds:5.2f} s")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--round"]:
        print(json.dumps(SIDES[argv[1]](Path(argv[2]))))
        return
    flags = parse_flags(StartUp, argv, "python benchmarks/start_up.py")
    introduce(f"{flags}, model {' '.join(MODEL)}")
    with tempfile.TemporaryDirectory(prefix="rosetrainer_") as name:
        folder = Path(name)
        prepare = [sys.executable, "data/prepare.py", "markov", "--out", str(folder / "markov")]
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        sides = [
            Side(side, ["benchmarks/start_up.py", "--round", side, name], environment())
            for side in SIDES
        ]
        found = in_turn(sides, flags.rounds, PAIRS)
        extra = extra_imports(folder)
    print_start_up(found, extra, flags.top)
    for benchmark, (theirs, own) in PAIRS.items():
        ratio = median(found, own, "seconds") / median(found, theirs, "seconds")
        keep(benchmark, ratio, WANTED, found, at_most=True, imports=extra)


def environment() -> dict[str, str]:
    """One thread a process, and gloo on the loopback, as our launcher has it."""
    names = {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex())
    return {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": names.pop()} if names else {})


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
