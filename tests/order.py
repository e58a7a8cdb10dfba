"""The order of the tests: what proves the core at once, then what takes longest.

xdist gives each worker as many tests as any other, in their order, and whoever has ended takes over
others' last ones. So each worker begins with files of FIRST, and short tests stand at the end.
"""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).parent
FIRST = (  # a row for each worker of `make test`
    ("proof/test_lattice.py", "faults/test_ranks.py", "faults/test_hangs.py"),
    ("parallel/test_pipeline.py", "test_steps_upkeep.py", "faults/test_kills.py"),
    ("proof/test_parity.py", "checkpoint/test_checkpoint.py", "checkpoint/test_resume.py"),
    ("parallel/test_zero.py", "test_steps.py"),
    ("proof/test_transformers.py", "training/test_train.py", "faults/test_signals.py"),
)


def lacking(seconds: dict[str, float]) -> list[str]:
    """What to say of files that FIRST lacks, by how long each took in a run: those that took longer
    than half of FIRST. Nothing of a run that had not all of these."""
    named = list(chain.from_iterable(FIRST))
    if not seconds.keys() >= set(named):
        return []
    long = median(seconds[name] for name in named)
    late = sorted(name for name in seconds.keys() - set(named) if seconds[name] > long)
    return [
        f"tests/{name} took {seconds[name]:.0f} s, longer than half of those that begin first: "
        f"name it in FIRST of tests/order.py"
        for name in late
    ]


def ordered(items: list[Any], workers: int) -> list[Any]:
    """items, pytest's, of which each of so many workers gets a contiguous part."""
    of_file: dict[str, list[Any]] = {}
    for item in items:
        of_file.setdefault(item.path.relative_to(TESTS).as_posix(), []).append(item)
    queues: list[list[Any]] = [[] for _ in range(workers)]
    for number, files in enumerate(FIRST):
        for name in files:
            queues[number % workers] += of_file.pop(name, [])
    others = (item for tests in of_file.values() for item in tests)
    left = len(items)
    for number, queue in enumerate(queues):
        size = left // (workers - number)  # as xdist divides
        queue += islice(others, max(size - len(queue), 0))
        left -= size
    return [item for queue in queues for item in queue]
