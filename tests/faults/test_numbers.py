"""nan and inf in one rank's numbers: every rank does the same about it, and says whose they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from faults.harness import FLAGS, Fault, launch, run, state

from rosetrainer.checkpoint.manifest import read_manifest

COMMAND = [*FLAGS, "--checkpoint-every", "1", "--keep", "9"]
LAYOUTS = (["--tp-size", "2"], ["--dp-size", "2"])


def poison_gradient(model: Any, *_: object) -> None:
    dict(model.named_parameters())["final_norm.weight"].grad[3] = math.nan


def overflow_gradient(model: Any, *_: object) -> None:
    dict(model.named_parameters())["final_norm.weight"].grad[0] = math.inf


def poison_weight(model: Any, *_: object) -> None:
    weights = dict(model.named_parameters())
    weights["blocks.0.feed_forward.dense_4h_to_h.weight"].data[0, 0] = math.nan


@pytest.mark.parametrize("act", [poison_gradient, overflow_gradient])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "dp2"])
def test_every_rank_skips_the_update_and_nothing_changes(
    layout: list[str], act: Any, markov: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [*COMMAND, *layout, "--data", str(markov), "--out", str(out), "--max-skipped", "1"]
    outcome = run(2, command, Fault(1, 7, "backward", act))
    assert outcome.statuses == [0, 0], outcome.complained
    assert "step     7/8  skipped, rank 1 has nan or inf in a gradient: final_norm" in outcome.said
    before, after = (state(out / f"step_{step:06d}") for step in (6, 7))
    assert before == after, "parameters and moments, bit for bit"
    assert state(out / "step_000008") != after, (
        "control: an update that is not skipped changes them"
    )
    progress = read_manifest(out / "step_000008").progress
    assert (progress.skipped, progress.updates) == (1, 7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "dp2"])
def test_by_default_the_run_stops_cleanly(layout: list[str], markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*COMMAND, *layout, "--data", str(markov), "--out", str(out)]
    outcome = run(2, command, Fault(1, 7, "backward", poison_gradient))
    assert outcome.statuses == [2, 2], outcome
    assert outcome.complained.startswith(
        "error: step 7: rank 1 has nan or inf in a gradient: final"
    )
    assert outcome.complained.count("\n") == 1
    assert state(out / "step_000006")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "dp2"])
def test_a_nan_loss_always_stops(layout: list[str], markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*COMMAND, *layout, "--data", str(markov), "--out", str(out), "--max-skipped", "5"]
    outcome = launch(2, command, Fault(1, 7, "forward", poison_weight)).wait()
    assert outcome.statuses == [2, 2], outcome
    assert outcome.complained.startswith("error: the loss is nan at step 7; try a learning_rate")
    assert outcome.complained.count("\n") == 1
