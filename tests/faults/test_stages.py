"""A stage of a pipeline that is killed or hangs in an action: resumed bitwise, or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults.harness import FLAGS, Fault, Finished, freeze, kill, run, sleep_on
from once import Once

PIPELINE = ["--n-layers", "3", "--micro-batch-size", "2", "--pp-size", "2", "--pp-schedule"]
SCHEDULES = {"stage forward": "1f1b", "stage backward": "1f1b", "stage weights": "zero-bubble"}


@pytest.fixture(scope="session")
def never_interrupted(markov: Path, once: Once) -> dict[str, Finished]:
    """By schedule."""

    def make(folder: Path) -> dict[str, Finished]:
        finished = {}
        for schedule in set(SCHEDULES.values()):
            out = folder / schedule / "run"
            flags = [*FLAGS, *PIPELINE, schedule, "--data", str(markov), "--out", str(out)]
            outcome = run(2, flags)
            assert outcome.statuses == [0, 0], outcome.complained
            finished[schedule] = Finished.of(out)
        return finished

    found: dict[str, Finished] = once("stages_never_interrupted", make)
    return found


@pytest.mark.parametrize("phase", SCHEDULES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_that_is_killed_goes_on_bitwise(
    phase: str, rank: int, markov: Path, tmp_path: Path, never_interrupted: dict[str, Finished]
) -> None:
    schedule, out = SCHEDULES[phase], tmp_path / "run"
    command = [*FLAGS, *PIPELINE, schedule, "--data", str(markov), "--out", str(out)]
    killed = run(2, command, Fault(rank, 5, phase, kill))
    assert killed.statuses[rank] == -9, killed
    resumed = run(2, command)
    assert resumed.statuses == [0, 0], resumed.complained
    assert "going on from" in resumed.said
    assert Finished.of(out) == never_interrupted[schedule]


@pytest.mark.parametrize(
    ("phase", "rank", "act"),
    [("stage forward", 0, sleep_on), ("stage backward", 1, freeze), ("stage weights", 1, sleep_on)],
)
def test_a_stage_that_hangs_is_named(
    phase: str, rank: int, act: Any, markov: Path, tmp_path: Path
) -> None:
    flags = [*PIPELINE, SCHEDULES[phase], "--timeout", "1", "--data", str(markov)]
    outcome = run(2, [*FLAGS, *flags, "--out", str(tmp_path / "run")], Fault(rank, 3, phase, act))
    told = [line for line in outcome.complained.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, outcome
    assert f"no progress for 1 s: rank {rank} " in told[0]
