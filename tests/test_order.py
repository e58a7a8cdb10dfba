"""Each test runs once, in whatever order, and what proves the core begins at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from order import FIRST, TESTS, ordered


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
