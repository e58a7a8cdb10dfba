"""A full disk, and corpora that change under a run: said in one line, and nothing is lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.harness import FLAGS, STEPS, Fault, Finished, kill, run

from rosetrainer.checkpoint.manifest import checkpoints, is_sound, step_of

COMMAND = [*FLAGS, "--tp-size", "2"]


def small_files(rank: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_limit_on_file_sizes_is_said_and_leaves_the_old_checkpoint(
    markov: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    command = [*COMMAND, "--data", str(markov), "--out"]
    run(2, [*command, str(out)], Fault(1, 3, "forward", kill))
    outcome = run(2, [*command, str(out)], prepare=small_files)
    assert 2 in outcome.statuses, outcome
    assert outcome.complained.count("error: ") == 1
    assert "cannot write a checkpoint in" in outcome.complained
    need, has = amounts(outcome.complained)
    assert has == 20_000 < need
    assert "(the limit on a file's size" in outcome.complained
    assert outcome.complained.count("\n") <= 5
    assert [step_of(folder) for folder in checkpoints(out)] == [2]
    assert is_sound(out / "step_000002")
    assert run(2, [*command, str(out)]).statuses == [0, 0], "with room again it goes on"
    run(2, [*command, str(whole)])
    assert Finished.of(out) == Finished.of(whole)


def amounts(text: str) -> tuple[int, int]:
    found = re.search(r"needs ([\d,]+) bytes and has ([\d,]+)", text)
    assert found, text
    need, has = (int(number.replace(",", "")) for number in found.groups())
    return need, has


def test_a_full_disk_at_the_start_is_one_line_too(markov: Path, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(2**20 - 8192))
    command = [*COMMAND, "--data", str(markov), "--out", str(small_disk / "run")]
    outcome = run(2, command)
    assert 2 in outcome.statuses, outcome  # the other rank may already miss it, and ends with 1
    assert outcome.complained.startswith(f"error: cannot write in {small_disk / 'run'}: No space")
    assert outcome.complained.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_leaves_the_old_checkpoint(markov: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    wide = ["--d-model", "64", "--eval-every", "0"]  # 0.6 MB a checkpoint
    command = [*COMMAND, *wide, "--data", str(markov), "--out", str(out)]
    outcome = run(2, command)
    assert 2 in outcome.statuses, outcome
    assert outcome.complained.count("error: ") == 1
    assert "No space left on device" in outcome.complained, outcome.complained
    need, has = amounts(outcome.complained)
    assert 0 < has < need
    assert [step_of(folder) for folder in checkpoints(out)] == [2]
    assert is_sound(out / "step_000002")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    whole = run(2, command)
    assert whole.statuses == [0, 0]
    assert outcome.seconds < 10 * (1 + whole.seconds)
    assert not list(out.glob(".step*"))


def test_control_there_is_room_for_the_same_run(markov: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "--d-model", "64", "--data", str(markov), "--out", str(tmp_path / "run")]
    assert run(2, command).statuses == [0, 0]


def harm(path: Path, how: str) -> None:
    """In place, as an editor or a copy would."""
    size = path.stat().st_size
    if how == "cut":
        os.truncate(path, 100)
    elif how == "id out of range":
        np.full(size // 2, 99, "<u2").tofile(path)
    else:
        ids = np.fromfile(path, "<u2")
        ids[1000] = (ids[1000] + 1) % 8
        ids.tofile(path)


WHILE_RUNNING = {
    "cut": "ends before byte",
    "id out of range": r"token \d+ \(byte \d+\) is 99, not below vocab_size=8",
    "change": r"was changed while in use, as seen when byte \d+ was read",
}


@pytest.fixture
def corpus(markov: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(markov, tmp_path / "corpus"))


class Harm:
    """A fault's act; it can be sent to another process."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = path, how

    def __call__(self, *_: Any) -> None:
        harm(self.path, self.how)


@pytest.mark.parametrize("how", WHILE_RUNNING)
@pytest.mark.parametrize("layout", ["--tp-size", "--dp-size"])
def test_a_corpus_that_changes_under_a_run_is_named_with_the_place(
    how: str, layout: str, corpus: Path, tmp_path: Path
) -> None:
    path = corpus / "train.bin"
    command = [*FLAGS, layout, "2", "--data", str(corpus), "--out", str(tmp_path / "run")]
    outcome = run(2, command, Fault(0, 3, "updated", Harm(path, how)))
    assert 2 in outcome.statuses, outcome
    assert not {-7, -11} & set(outcome.statuses), "no SIGBUS"
    assert outcome.complained.count("error: ") == 1
    assert outcome.complained.startswith(f"error: {path}")
    assert re.search(WHILE_RUNNING[how], outcome.complained), outcome.complained


BEFORE_A_RESUME = {
    "cut": "has 50 tokens, but meta.json says",
    "id out of range": r"token 0 \(byte 0\) is 99, not below vocab_size=8",
    "change": "bytes 0 to 800000 are not what meta.json describes",
}


@pytest.mark.parametrize("how", BEFORE_A_RESUME)
def test_a_corpus_that_changed_before_a_resume_is_named_with_the_place(
    how: str, corpus: Path, tmp_path: Path
) -> None:
    path = corpus / "train.bin"
    command = [*COMMAND, "--data", str(corpus), "--out", str(tmp_path / "run")]
    run(2, command, Fault(1, 5, "forward", kill))
    harm(path, how)
    outcome = run(2, command)
    assert outcome.refused, outcome
    assert outcome.complained.startswith(f"error: {path}")
    assert re.search(BEFORE_A_RESUME[how], outcome.complained), outcome.complained


def test_another_corpus_is_not_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    from rosetrainer.commands.prepare import main as prepare

    command = [*COMMAND, "--data", str(corpus), "--out", str(tmp_path / "run")]
    run(2, command, Fault(1, 5, "forward", kill))
    shutil.rmtree(corpus)
    prepare(["markov", "--seed", "5", "--out", str(corpus)])
    outcome = run(2, command)
    assert outcome.refused, outcome
    assert "train.bin is not what" in outcome.complained
    assert "was trained on" in outcome.complained


def test_control_an_untouched_corpus_is_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "--data", str(corpus), "--out", str(tmp_path / "run")]
    run(2, command, Fault(1, 5, "forward", kill))
    outcome = run(2, command)
    assert outcome.statuses == [0, 0], outcome.complained
    assert f"step     {STEPS}/{STEPS}" in outcome.said
