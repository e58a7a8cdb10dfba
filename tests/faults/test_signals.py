"""SIGTERM and Ctrl-C at any moment: everything is saved, and nothing more than that happens."""

from __future__ import annotations

import os
import random
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
    STEPS,
    TRAINING,
    Fault,
    Finished,
    launch,
    losses,
    run,
)
from ranks import LONGEST_SECONDS

from rosetrainer.checkpoint.manifest import checkpoints, step_of

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [*FLAGS, "--tp-size", "2"]
TRIALS = 25 if CHAOS else 3
STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130}


def receive(signum: signal.Signals) -> None:
    """Until the thread that reads signals has noted it, however long it waits for a processor."""
    from rosetrainer.launch.rank import STOP

    os.kill(os.getpid(), signum)
    while STOP.signal is None:
        time.sleep(0.001)


def terminate(*_: object) -> None:
    receive(signal.SIGTERM)


def do_nothing(*_: object) -> None:
    """The fault is only a mark of time."""


def interrupt(*_: object) -> None:
    receive(signal.SIGINT)


@pytest.fixture(scope="module")
def never_interrupted(markov: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("signals") / "run"
    outcome = run(2, [*COMMAND, "--data", str(markov), "--out", str(out)])
    assert outcome.statuses == [0, 0], outcome.complained
    return Finished.of(out)


@pytest.mark.parametrize("number", range(TRIALS))
@pytest.mark.parametrize("signum", STATUS, ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_one_rank_saves_all_at_one_step(
    number: int, signum: signal.Signals, markov: Path, tmp_path: Path, never_interrupted: Finished
) -> None:
    draw = random.Random(f"{number} {signum}")
    act = terminate if signum == signal.SIGTERM else interrupt
    phase = draw.choice([*TRAINING, "mid-save"])
    step = draw.randrange(1, STEPS) if phase != "mid-save" else draw.choice([2, 4, 6])
    phase = "shard" if phase == "mid-save" else phase
    out = tmp_path / "run"
    command = [*COMMAND, "--data", str(markov), "--out", str(out)]
    stopped = run(2, command, Fault(draw.randrange(2), step, phase, act))
    assert stopped.statuses == [STATUS[signum]] * 2, stopped
    assert stopped.after_fault < 10 * (1 + stopped.before_fault)
    assert not stopped.complained
    assert "the same command goes on from there" in stopped.said
    newest = checkpoints(out)[0]
    assert step_of(newest) == max(losses(out)), "no step that was computed is lost"
    assert step <= step_of(newest) <= step + 1
    resumed = run(2, command)
    assert resumed.statuses == [0, 0], resumed.complained
    assert Finished.of(out) == never_interrupted


@pytest.mark.parametrize("number", range(TRIALS))
def test_a_signal_during_the_start_ends_at_once(number: int, markov: Path, tmp_path: Path) -> None:
    """At any moment from the first on; if the loop is reached, then as above."""
    draw = random.Random(number)
    signum, phase = draw.choice(list(STATUS)), draw.choice([*BEGINNING, "batch"])
    step = 1 if phase == "batch" else 0
    out = tmp_path / "run"
    command = [*COMMAND, "--data", str(markov), "--out", str(out)]
    ranks = launch(2, command, Fault(0, step, phase, do_nothing))
    ranks.wait_for(lambda: ranks.ready and ranks.struck)
    ranks.send(signum)
    ended = ranks.wait()
    assert set(ended.statuses) <= {STATUS[signum], 0}, ended  # 0: it had come to its end
    assert ended.after_fault < 10 * (1 + ended.before_fault)
    assert not ended.complained, ended.complained


def test_control_a_rank_that_does_not_listen_loses_its_steps(markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fault = Fault(1, 5, "forward", terminate)
    command = [*COMMAND, "--data", str(markov), "--out", str(out)]
    stopped = run(2, command, fault, prepare=listen_no_more)
    assert stopped.statuses[1] == -signal.SIGTERM
    assert step_of(checkpoints(out)[0]) < 5


def listen_no_more(rank: int) -> None:
    from rosetrainer.launch.rank import STOP

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    STOP.listen = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("signum", STATUS, ids=["SIGTERM", "SIGINT"])
def test_under_the_launcher_a_signal_is_one_line_and_one_status(
    signum: signal.Signals, markov: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = [*FLAGS, "--steps", "100000", "--data", str(markov), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rosetrainer", "train", "--nproc", "2", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started = time.monotonic()
    while not checkpoints(out):
        assert time.monotonic() < started + LONGEST_SECONDS
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signum)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert time.monotonic() - sent < 10 * (1 + sent - started)
    assert process.returncode == STATUS[signum]
    said = "interrupted" if signum == signal.SIGINT else "stopped by SIGTERM"
    assert errors.startswith(f"{said}; saved in {out}/step_"), errors
    assert errors.count("\n") == 1


def test_a_long_step_is_ended_and_saved(markov: Path, tmp_path: Path) -> None:
    """The ranks have the time that they measured, as they say; the test ends the step."""
    out = tmp_path / "run"
    flags = [*COMMAND, "--data", str(markov), "--out", str(out), "--grace", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slow_train", str(tmp_path), "train", "--nproc", "2", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    end = time.monotonic() + LONGEST_SECONDS
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = iter(process.stdout.readline, "")
    assert any(
        line.startswith("finishing the step under way, then saving: about 10") for line in said
    )
    (tmp_path / "end").touch()
    _, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0
    where = out / "step_000004"
    assert errors == f"stopped by SIGTERM; saved in {where}; the same command goes on from there\n"
    assert where.exists()
