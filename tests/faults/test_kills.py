"""SIGKILL anywhere: the same command goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.harness import (
    BEGINNING,
    CHAOS,
    FLAGS,
    OF_RANK_0,
    SAVING,
    STEPS,
    TRAINING,
    Fault,
    Finished,
    kill,
    launch,
    run,
    state,
)
from once import Once
from ranks import LONGEST_SECONDS

from rosetrainer.checkpoint.manifest import checkpoints, is_sound

ROOT = Path(__file__).resolve().parent.parent.parent
LAYOUTS = (["--tp-size", "2"], ["--dp-size", "2"])
ANYWHERE = 200 if CHAOS else 6
A_PHASE = 25 if CHAOS else 1
AFTER_THE_NAME = ("renamed", "retention", "removal")


@pytest.fixture(scope="session")
def never_interrupted(markov: Path, once: Once) -> list[Finished]:
    """By layout."""

    def make(folder: Path) -> list[Finished]:
        finished = []
        for number, layout in enumerate(LAYOUTS):
            out = folder / str(number) / "run"
            outcome = run(2, [*FLAGS, *layout, "--data", str(markov), "--out", str(out)])
            assert outcome.statuses == [0, 0], outcome.complained
            finished.append(Finished.of(out))
        return finished

    finished: list[Finished] = once("never_interrupted", make)
    return finished


def anywhere(number: int) -> Fault:
    """Trial number `number`: a rank, a step and a phase, drawn from its seed."""
    draw = random.Random(number)
    rank, step = draw.randrange(2), draw.randrange(1, STEPS + 1)
    phases = list(TRAINING)
    if step % 4 == 0:
        phases.append("evaluation")
    if step % 2 == 0:
        phases += [phase for phase in SAVING if rank == 0 or phase not in OF_RANK_0]
        if step < 6:  # nothing is old enough to be removed
            phases = [phase for phase in phases if phase != "removal"]
    beginning = [phase for phase in BEGINNING if rank == 0 or phase not in OF_RANK_0]
    phase = draw.choice([*phases, draw.choice(beginning)])
    return Fault(rank, 0 if phase in BEGINNING else step, phase, kill)


def in_a_save(phase: str, number: int) -> Fault:
    draw = random.Random(f"{phase} {number}")
    rank = 0 if phase in OF_RANK_0 else draw.randrange(2)
    steps = (6, 8) if phase == "removal" else (2, 4, 6, 8)
    return Fault(rank, draw.choice(steps), phase, kill)


TRIALS = [
    *(pytest.param(n, anywhere(n), id=f"anywhere-{n}") for n in range(ANYWHERE)),
    *(
        pytest.param(n, in_a_save(phase, n), id=f"{phase}-{n}")
        for phase in SAVING
        for n in range(A_PHASE)
    ),
]


@pytest.mark.parametrize(("number", "fault"), TRIALS)
def test_a_killed_run_goes_on_bitwise(
    number: int, fault: Fault, markov: Path, tmp_path: Path, never_interrupted: list[Finished]
) -> None:
    out, layout = tmp_path / "run", number % len(LAYOUTS)
    command = [*FLAGS, *LAYOUTS[layout], "--data", str(markov), "--out", str(out)]
    # Rank 0 waits for the files of the other until its launcher or the hang watch ends it.
    waits = [0] if fault.rank == 1 and fault.phase in ("mid-shard", "shard") else []
    killed = run(2, command, fault, hangs=waits)
    assert killed.statuses[fault.rank] == -9, killed
    assert killed.complained.count("error:") <= 1, killed.complained
    assert all(is_sound(folder) for folder in checkpoints(out))
    resumed = run(2, command)
    assert resumed.statuses == [0, 0], resumed.complained
    assert Finished.of(out) == never_interrupted[layout]
    assert not list(out.glob(".*.part")), "what the killed run left is cleared away"
    assert ("going on from" in resumed.said) == (fault.step > 2 or fault.phase in AFTER_THE_NAME)


@pytest.mark.skipif(not CHAOS, reason="make chaos: it starts torch in four processes")
def test_torchrun_restarts_a_killed_run_by_itself(markov: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--steps", "200", "--tp-size", "2", "--data", str(markov), "--out"]
    out, whole = tmp_path / "run", tmp_path / "whole"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "--max-restarts=1", "-m", "rosetrainer", "train", *flags, out],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "step_000020").exists():
        assert process.poll() is None
        time.sleep(0.01)
    holder = int((out / ".lock").read_text().split()[1])  # rank 0
    os.kill(holder, signal.SIGKILL)
    said, complained = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0, complained
    assert "going on from" in said
    assert run(2, [*flags, str(whole)]).statuses == [0, 0]
    assert state(out / "step_000200") == state(whole / "step_000200")


OTHERWISE = {
    "evaluations more often than checkpoints": ["--eval-every", "1", "--checkpoint-every", "8"],
    "behind training": ["--async-checkpoint"],
    "from a path": ["--resume", "PATH"],
}


@pytest.mark.parametrize("number", range(10 if CHAOS else 1))
@pytest.mark.parametrize("flags", OTHERWISE)
def test_a_killed_run_with_other_flags_goes_on_bitwise(
    flags: str, number: int, markov: Path, tmp_path: Path, never_interrupted: list[Finished]
) -> None:
    out, more, origin = tmp_path / "run", OTHERWISE[flags], tmp_path / "origin"
    command = [*FLAGS, *LAYOUTS[0], "--data", str(markov), "--out"]
    if "PATH" in more:
        run(2, [*command, str(origin)], Fault(1, 3, "forward", kill))
        more = ["--resume", str(origin / "step_000002")]
        shutil.copy(f"{origin}.losses", f"{out}.losses")
    draw = random.Random(f"{flags} {number}")
    fault = Fault(draw.randrange(2), draw.randrange(5, STEPS), draw.choice(TRAINING), kill)
    assert -9 in run(2, [*command, str(out), *more], fault).statuses
    resumed = run(2, [*command, str(out), *more])
    assert resumed.statuses == [0, 0], resumed.complained
    assert Finished.of(out) == never_interrupted[0]


def test_a_run_whose_ranks_hold_slices_goes_on_bitwise(markov: Path, tmp_path: Path) -> None:
    """Killed in a backward pass of level 3, which gathers in bf16."""
    flags = [*FLAGS, "--dp-size", "2", "--zero", "3", "--dtype", "bfloat16", "--data", str(markov)]
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert run(2, [*flags, "--out", str(whole)]).statuses == [0, 0]
    command = [*flags, "--out", str(out)]
    assert run(2, command, Fault(1, 5, "backward", kill)).statuses[1] == -9
    assert run(2, command).statuses == [0, 0]
    assert Finished.of(out) == Finished.of(whole)


def test_all_ranks_killed_at_once(
    markov: Path, tmp_path: Path, never_interrupted: list[Finished]
) -> None:
    out = tmp_path / "run"
    command = [*FLAGS, *LAYOUTS[0], "--data", str(markov), "--out", str(out)]
    ranks = launch(2, command)
    ranks.wait_for(lambda: (out / "step_000002").exists())
    ranks.send(signal.SIGKILL)
    assert ranks.wait().statuses == [-9, -9]
    assert run(2, command).statuses == [0, 0]
    assert Finished.of(out) == never_interrupted[0]


def test_control_without_its_moments_a_run_does_not_go_on_bitwise(
    markov: Path, tmp_path: Path, never_interrupted: list[Finished]
) -> None:
    """The comparison can fail."""
    out = tmp_path / "run"
    command = [*FLAGS, *LAYOUTS[0], "--data", str(markov), "--out", str(out)]
    run(2, command, Fault(1, 5, "forward", kill))
    assert run(2, command, prepare=forget_moments).statuses == [0, 0]
    came_to = Finished.of(out)
    assert came_to.losses != never_interrupted[0].losses
    assert came_to.state != never_interrupted[0].state


def forget_moments(rank: int) -> None:
    from rosetrainer.training import setup

    original = setup.load_checkpoint

    def without_moments(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        arguments[3].state.clear()  # type: ignore[attr-defined]

    setup.load_checkpoint = without_moments  # type: ignore[assignment]


def test_control_a_save_under_the_final_name_is_found_half(markov: Path, tmp_path: Path) -> None:
    """Were a draft called by its final name at once, a kill would leave half a checkpoint."""
    out = tmp_path / "run"
    command = [*FLAGS, *LAYOUTS[0], "--data", str(markov), "--out", str(out)]
    run(2, command, Fault(0, 2, "manifest", kill), prepare=draft_in_place)
    assert not all(is_sound(folder) for folder in checkpoints(out))


def draft_in_place(rank: int) -> None:
    from rosetrainer.checkpoint.slices import Draft

    folder = property(lambda draft: draft.run / f"step_{draft.step:06d}")
    Draft.folder = folder  # type: ignore[method-assign, assignment]
