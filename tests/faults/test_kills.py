"""SIGKILL anywhere: the same command goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from faults.harness import (
    CHAOS,
    FLAGS,
    OF_RANK_0,
    SAVING,
    STEPS,
    TRAINING,
    Fault,
    Finished,
    kill,
    run,
)

from rosetrainer.manifest import checkpoints, is_sound

LAYOUTS = (["--tp-size", "2"], ["--dp-size", "2"])
ANYWHERE = 200 if CHAOS else 30
A_PHASE = 25 if CHAOS else 1
AFTER_THE_NAME = ("renamed", "retention", "removal")


@pytest.fixture(scope="session")
def never_interrupted(markov: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    """By layout."""
    finished = []
    for layout in LAYOUTS:
        out = tmp_path_factory.mktemp("finished") / "run"
        outcome = run(2, [*FLAGS, *layout, "--data", str(markov), "--out", str(out)])
        assert outcome.statuses == [0, 0], outcome.complained
        finished.append(Finished.of(out))
    return finished


def anywhere(number: int) -> Fault:
    """Trial number `number`: a rank, a step and a phase, drawn from its seed."""
    draw = random.Random(number)
    rank, step = draw.randrange(2), draw.randrange(1, STEPS + 1)
    phases = list(TRAINING)
    if step % 4 == 0:
        phases += ["evaluation", "weights"]
    if step % 2 == 0:
        phases += [phase for phase in SAVING if rank == 0 or phase not in OF_RANK_0]
        if step < 6:  # nothing is old enough to be removed
            phases = [phase for phase in phases if phase != "removal"]
    phase = draw.choice([*phases, "start"])
    return Fault(rank, 0 if phase == "start" else step, phase, kill)


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
    killed = run(2, command, fault)
    assert killed.statuses[fault.rank] == -9, killed
    assert killed.complained.count("error:") <= 1, killed.complained
    assert all(is_sound(folder) for folder in checkpoints(out))
    resumed = run(2, command)
    assert resumed.statuses == [0, 0], resumed.complained
    assert Finished.of(out) == never_interrupted[layout]
    assert not list(out.glob(".*.part")), "what the killed run left is cleared away"
    assert ("going on from" in resumed.said) == (fault.step > 2 or fault.phase in AFTER_THE_NAME)


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
    assert came_to.weights != never_interrupted[0].weights


def forget_moments(rank: int) -> None:
    from rosetrainer import train

    original = train.load_checkpoint

    def without_moments(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        arguments[3].state.clear()  # type: ignore[attr-defined]

    train.load_checkpoint = without_moments  # type: ignore[assignment]


def test_control_a_save_under_the_final_name_is_found_half(markov: Path, tmp_path: Path) -> None:
    """Were a draft called by its final name at once, a kill would leave half a checkpoint."""
    out = tmp_path / "run"
    command = [*FLAGS, *LAYOUTS[0], "--data", str(markov), "--out", str(out)]
    run(2, command, Fault(0, 2, "manifest", kill), prepare=draft_in_place)
    assert not all(is_sound(folder) for folder in checkpoints(out))


def draft_in_place(rank: int) -> None:
    from rosetrainer.checkpoint_files import Draft

    folder = property(lambda draft: draft.run / f"step_{draft.step:06d}")
    Draft.folder = folder  # type: ignore[method-assign, assignment]
