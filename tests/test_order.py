"""Each test runs once, in whatever order, and what proves the core begins at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from order import FIRST, TESTS, lacking, ordered


@dataclass(frozen=True)
class Item:
    path: Path
    number: int


def test_the_files_that_come_first_are_there() -> None:
    for name in (name for files in FIRST for name in files):
        assert (TESTS / name).exists(), name


@pytest.mark.parametrize("workers", [1, 2, 5, 7])
def test_no_test_is_lost_and_each_worker_begins_with_a_file_of_its_own(workers: int) -> None:
    names = ["test_a.py", *(files[0] for files in FIRST), "test_z.py"]
    items = [Item(TESTS / name, number) for name in names for number in range(20)]
    found = ordered(items, workers)
    assert sorted(found, key=items.index) == items
    begins = {found[n * len(items) // workers].path for n in range(min(workers, len(FIRST)))}
    assert begins == {TESTS / files[0] for files in FIRST[:workers]}


def test_a_long_file_that_does_not_come_first_is_named() -> None:
    names = [name for files in FIRST for name in files]
    seconds = {name: float(n) for n, name in enumerate(names, 1)}
    half = len(names) / 2
    said = lacking(seconds | {"test_long.py": half + 1, "test_short.py": half - 1})
    assert [line.partition(" took")[0] for line in said] == ["tests/test_long.py"]
    assert not lacking({names[0]: 1.0, "test_long.py": 99.0})  # not all of the tests
