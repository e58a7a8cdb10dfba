"""What a machine is fast at: measured once, kept, and the same for all of its ranks."""

from __future__ import annotations

import errno
import json
import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import by_its_words

from rosetrainer.hardware import kernel_times, measured
from rosetrainer.hardware.kernel_times import Ratios
from rosetrainer.hardware.measured import Measured, look_up

KEY = {"processor": "A/B (R) 1", "flags": "12", "torch": "2.13.0+cpu", "version": 1}
NAME = "A-B-R-1_12_2.13.0+cpu_1.json"
FIRST, LATER = Ratios(0.25, 0.5, 1.5), Ratios(4.0, 2.0, 2.0)


class Times:
    """In the place of a measurement: FIRST, and LATER from the second one on."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self) -> Ratios:
        self.taken += 1
        return FIRST if self.taken == 1 else LATER


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    times = Times()
    monkeypatch.setattr(kernel_times, "measure", times)
    return times


def test_it_is_measured_once_and_then_read(times: Times, tmp_path: Path) -> None:
    folder, path = tmp_path / "a" / "b", tmp_path / "a" / "b" / NAME
    assert look_up(folder, KEY) == Measured(FIRST, f"measured now, kept in {path}")
    assert look_up(folder, KEY) == Measured(FIRST, f"as kept in {path}")
    assert times.taken == 1
    assert json.loads(path.read_text())["processor"] == "A/B (R) 1"
    other = KEY | {"torch": "2.11.0+cpu"}
    assert look_up(folder, other).ratios == LATER
    assert times.taken == 2


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff", b"[" * 9999, b"3", b" " * 99999),
        json.dumps(KEY | {"ratios": {"bf16": 1.0, "other": 2.0}}).encode(),
        json.dumps(KEY | {"ratios": [1.0]}).encode(),
        json.dumps(KEY | {"ratios": {"bf16": math.nan}}).encode(),
        json.dumps(KEY | {"ratios": {"bf16": -1.0}}).encode(),
        json.dumps(KEY | {"ratios": {"bf16": 1.0}, "processor": "another"}).encode(),
        json.dumps(KEY | {"ratios": {"bf16": 1.0}, "version": 2}).encode(),
    ],
)
def test_a_file_that_is_broken_or_of_another_machine_is_measured_anew(
    times: Times, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert look_up(tmp_path, KEY).ratios == FIRST
    assert look_up(tmp_path, KEY).ratios == FIRST
    assert times.taken == 1


def test_of_two_ranks_the_second_waits_and_takes_what_the_first_has_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits, found, second = threading.Event(), [], threading.Thread()

    def first_measures() -> Ratios:
        nonlocal second
        second = threading.Thread(target=lambda: found.append(look_up(tmp_path, KEY)))
        monkeypatch.setattr(kernel_times, "measure", lambda: LATER)
        second.start()
        assert waits.wait(60)
        return FIRST

    monkeypatch.setattr(kernel_times, "measure", first_measures)
    monkeypatch.setattr(measured.time, "sleep", lambda _: waits.set())
    found.append(look_up(tmp_path, KEY))
    second.join(60)
    assert [one.ratios for one in found] == [FIRST, FIRST]


def held_for_long(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    def held(*args: int) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(measured.fcntl, "flock", held)
    monkeypatch.setattr(measured, "PATIENCE_SECONDS", -1.0)
    return "another process has been measuring for long"


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(measured, "write_json", fail)
    return "No space left on device"


def no_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    folder.rmdir()
    folder.write_text("a file")
    return "File exists"


@pytest.mark.parametrize("fault", [held_for_long, full_disk, no_folder])
def test_without_a_place_one_rank_measures_each_time_and_several_go_by_the_flags(
    fault: Any, times: Times, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    problem = f"for {folder / NAME} cannot be written: {fault(monkeypatch, folder)}"
    for _ in range(2):
        alone = look_up(folder, KEY)
        assert alone.source == f"measured now and at every start, {problem}"
        assert alone.ratios in (FIRST, LATER)
    several = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in several.items():
        monkeypatch.setenv(name, str(value))
    for native in (True, False):
        monkeypatch.setattr(measured, "has_native_bf16", lambda _, native=native: native)
        found = look_up(folder, KEY)
        chosen = [found.is_faster(what) for what in ("bf16", "linear", "sums")]
        assert chosen == [native, False, False]
        assert found.why("float32", "torch") == (
            f"dtype=auto is float32, kernels=auto is torch; by the processor's flags, {problem}"
        )


def test_the_place_is_ours_or_the_user_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSETRAINER_CACHE", "/own")
    assert measured.cache_folder() == Path("/own")
    monkeypatch.delenv("ROSETRAINER_CACHE")
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert measured.cache_folder() == Path("/shared/rosetrainer")
    for other in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert measured.cache_folder() == Path("/home/a/.cache/rosetrainer")


def test_nothing_is_written_beside_the_work_where_there_is_no_home(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no home"), measured.locked(Path("~/.cache/x.json")):
        pass


def test_another_way_has_to_be_clearly_faster() -> None:
    for ratio, faster in ((0.5, True), (0.9, True), (0.91, False), (3.0, False)):
        assert Measured(Ratios(ratio), "").is_faster("bf16") == faster
        assert Measured(Ratios(1.0, linear=ratio), "").is_faster("linear") == faster
        assert Measured(Ratios(1.0, sums=ratio), "").is_faster("sums") == faster


def test_a_block_in_bf16_is_compared_with_the_best_one_in_fp32() -> None:
    times = {"linear": 2.0, "sums": 1.0, "attention": 4.0}
    times |= {"products in bf16": 1.0, "attention in bf16": 8.0}
    assert kernel_times.ratios(times) == Ratios((12 * 1 + 8) / (12 * 3 + 4), 1.0, 1.0)
    times |= {"linear by oneDNN": 1.0, "sums by oneDNN": 3.0}
    assert kernel_times.ratios(times) == Ratios((12 * 1 + 8) / (12 * 2 + 4), 0.5, 3.0)


def test_the_log_says_what_was_chosen_and_why() -> None:
    found = Measured(Ratios(9.123, 0.512, 1.04), "measured now")
    bf16 = "dtype=auto is float32 (a block in bfloat16 takes 9.12 of one in float32)"
    onednn = "kernels=auto is a,b (oneDNN's linear takes 0.51 of torch's time, its sums 1.04)"
    assert found.why("float32", "a,b") == f"{bf16}, {onednn}; measured now"
    assert found.why("float32", "") == f"{bf16}; measured now"
    assert found.why("", "a,b") == f"{onednn}; measured now"


def test_this_machine_is_measured_in_a_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "SECONDS", 0.0)  # as few rounds as may be
    state, threads, seen = torch.get_rng_state(), torch.get_num_threads(), []
    rounds = kernel_times.best_of_rounds

    def spy() -> Ratios:
        seen.append(torch.get_num_threads())
        return rounds()

    monkeypatch.setattr(kernel_times, "best_of_rounds", spy)
    torch.set_num_threads(2)
    try:
        found = kernel_times.measure()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)
    assert all(0 < ratio < math.inf for ratio in vars(found).values())
    assert torch.equal(torch.get_rng_state(), state), "the run's own numbers are not drawn"


@pytest.mark.parametrize(("slower", "rounds"), [(1, 5), (2.9, 5), (3.1, 2)])
def test_bf16_that_is_emulated_is_measured_no_longer_than_it_takes_to_see_that(
    monkeypatch: pytest.MonkeyPatch, slower: float, rounds: int
) -> None:
    """By a clock that each work moves on: the first round is slow for all."""
    now, runs = 0.0, dict.fromkeys(kernel_times.works_of_a_block(), 0)

    def work(name: str) -> None:
        nonlocal now
        runs[name] += 1
        now += (slower if "bf16" in name else 1) * (2 if "products" in name else 1)
        now += 9 * (runs[name] == 1)

    works = {name: partial(work, name) for name in ("linear", "sums", "attention")}
    works |= {name: partial(work, name) for name in ("products in bf16", "attention in bf16")}
    monkeypatch.setattr(kernel_times, "works_of_a_block", lambda: works)
    monkeypatch.setattr(kernel_times.time, "perf_counter", lambda: now)
    found = kernel_times.measure()
    assert found.bf16 == pytest.approx(slower)
    assert [runs["products in bf16"], runs["attention in bf16"]] == [rounds, rounds]
    assert [runs["linear"], runs["sums"], runs["attention"]] == [5, 5, 5]


def test_a_process_looks_once(
    times: Times, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROSETRAINER_CACHE", str(tmp_path))
    measured.machine.cache_clear()
    try:
        assert measured.machine() is measured.machine()
        assert times.taken == 1
        assert len(list(tmp_path.glob("*.json"))) == 1
    finally:
        measured.machine.cache_clear()


def test_tests_go_by_what_is_given_to_them() -> None:
    assert measured.machine().ratios == by_its_words().ratios
