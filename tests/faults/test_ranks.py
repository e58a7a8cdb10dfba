"""A rank that hangs, lags, raises, or was started with other settings is named, once."""

from __future__ import annotations

import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from faults.harness import CHAOS, FLAGS, TRAINING, Fault, freeze, launch, run, sleep_on
from machine import like

from rosetrainer.launch.rank import RENDEZVOUS_DIR
from rosetrainer.launch.watch import RankState, at_fault
from rosetrainer.parallel.context import Axis
from rosetrainer.reporting.slow_ranks import SlowRanks, slow_ranks

TIMEOUT = 2
COMMAND = [*FLAGS, "--timeout", str(TIMEOUT)]
TRIALS = 25 if CHAOS else 2
CLEAN = 20 if CHAOS else 4


def boom(*_: object) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("number", range(TRIALS))
@pytest.mark.parametrize("act", [freeze, sleep_on])
def test_a_rank_that_hangs_is_named_and_all_end(
    act: Any, number: int, markov: Path, tmp_path: Path
) -> None:
    draw = random.Random(number)
    rank, layout = draw.randrange(2), draw.choice(["--tp-size", "--dp-size"])
    phase = draw.choice([*TRAINING, "shard"])
    command = [*COMMAND, layout, "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    step = draw.choice([2, 4, 6]) if phase == "shard" else draw.randrange(2, 8)
    outcome = run(2, command, Fault(rank, step, phase, act))
    assert outcome.after_fault < TIMEOUT + 10 * (1 + outcome.before_fault)
    assert outcome.complained.startswith(f"error: no progress for {TIMEOUT} s: rank {rank} "), (
        outcome
    )
    assert outcome.complained.count("\n") == 1


def test_a_frozen_rank_that_keeps_the_store_is_named_as_well(markov: Path, tmp_path: Path) -> None:
    """As where ranks are started by MASTER_ADDR and MASTER_PORT, or a node loses its power."""
    command = [*COMMAND, "--tp-size", "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, RENDEZVOUS_DIR: ""}
    outcome = run(2, command, Fault(0, 3, "forward", freeze), environment=address)
    assert outcome.after_fault < TIMEOUT + 10 * (1 + outcome.before_fault)
    assert (
        f"no progress for {TIMEOUT} s: rank 0, which keeps the ranks' store" in outcome.complained
    )
    assert outcome.complained.count("error: ") == 1


def test_control_without_the_watch_a_hang_lasts(markov: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "--tp-size", "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    ranks = launch(2, command, Fault(1, 3, "forward", freeze), prepare=watch_nothing)
    ranks.wait_for(lambda: ranks.struck)
    time.sleep(TIMEOUT + 5)
    assert all(rank.is_alive() for rank in ranks.processes)
    ranks.send(signal.SIGKILL)
    assert not ranks.wait().complained


def watch_nothing(rank: int) -> None:
    from rosetrainer.launch.watch import HangWatch

    HangWatch._measure = lambda self: None  # type: ignore[method-assign]


def test_who_is_at_fault() -> None:
    def answers(*begun: int | None, works: int | None = None) -> dict[int, RankState]:
        found = {rank: n for rank, n in enumerate(begun) if n is not None}
        return {r: RankState(n, r != works, 9.0, "here", 0.0) for r, n in found.items()}

    every = {0, 1, 2}
    assert at_fault(answers(7, None, 7), every, 3) == (1, "gives no sign of life")
    assert at_fault(answers(7, None, 7), {0, 2}, 3) == (1, "has not come to the others")
    assert at_fault(answers(7, 8, 8), every, 3)[0] == 0
    assert at_fault(answers(8, 7, 7, works=2), every, 3)[0] == 2
    assert at_fault(answers(8, 7, 8, works=2), every, 3)[0] == 1
    assert at_fault(answers(7, 7, 7, works=1), every, 3)[0] == 1
    assert "waits like all others" in at_fault(answers(7, 7, 7), every, 3)[1]


def test_who_is_slow() -> None:
    assert slow_ranks([1.0, 1.1, 5.0, 0.9], 3.0, 0.01) == {2}
    assert slow_ranks([1.0, 2.9], 3.0, 0.01) == set()
    assert slow_ranks([0.001, 0.008], 3.0, 0.01) == set()  # too little to be sure of


LONG = [*FLAGS, "--steps", "30", "--checkpoint-every", "0"]


def lag(rank: int) -> None:
    """From step 6 on, rank 1 sleeps for five medians of the steps before."""
    if rank != 1:
        return
    from rosetrainer.training import trainer

    original = trainer.train_step
    seconds: list[float] = []

    def train_step(*args: Any) -> Any:
        started = time.perf_counter()
        if len(seconds) >= 5:
            time.sleep(5 * sorted(seconds[1:5])[2])
        figures = original(*args)
        seconds.append(time.perf_counter() - started)
        return figures

    trainer.train_step = train_step  # type: ignore[assignment]


@pytest.mark.parametrize("layout", ["--tp-size 2", "--dp-size 2", "--pp-size 2 --n-layers 2"])
def test_a_slow_rank_is_named_within_20_steps(layout: str, markov: Path, tmp_path: Path) -> None:
    command = [*LONG, *layout.split(), "--data", str(markov), "--out", str(tmp_path / "run")]
    outcome = run(2, command, prepare=lag)
    assert outcome.statuses == [0, 0], outcome.complained
    found = re.search(r"rank 1 is slow: .* ms a step by itself", outcome.said)
    assert found, outcome.said
    steps = re.findall(r"^step +(\d+)/", outcome.said[: found.start()], re.MULTILINE)
    assert int(steps[-1]) <= 6 + 20
    assert "rank 0 is slow" not in outcome.said


def test_a_slow_rank_is_told_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it recovers: on a machine that others use as well that is often."""
    windows = iter([[0.1, 0.9], [0.1, 0.9], [0.1, 0.1], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1]] * 2)
    gathered = lambda *_, **__: torch.tensor(next(windows))  # noqa: E731
    monkeypatch.setattr("rosetrainer.reporting.slow_ranks.all_gather", gathered)
    slow = SlowRanks(Axis("world", size=2), [], torch.device("cpu"))
    said = []
    for _ in range(12 * SlowRanks.WINDOW):
        slow.begin_step()
        said.append(slow.end_step())
    assert [line for line in said if line] == [
        "rank 1 is slow: 900 ms a step by itself, where the others need 100"
    ]


@pytest.mark.parametrize("number", range(CLEAN))
def test_a_clean_run_raises_no_alarm(number: int, markov: Path, tmp_path: Path) -> None:
    layout, saves = ["--tp-size", "--dp-size"][number % 2], ["0", "1"][number // 2 % 2]
    command = [*LONG, layout, "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    command += ["--checkpoint-every", saves]
    outcome = run(2, command)
    assert outcome.statuses == [0, 0], outcome.complained
    assert "slow" not in outcome.said
    assert not outcome.complained


@pytest.mark.parametrize("layout", ["--tp-size", "--dp-size"])
def test_what_one_rank_raises_is_told_once(layout: str, markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*FLAGS, layout, "2", "--data", str(markov), "--out", str(out)]
    outcome = run(2, command, Fault(1, 3, "forward", boom))
    assert outcome.statuses[1] == 1
    lines = outcome.complained.splitlines()
    assert lines[0] == "error: rank 1 of 2 failed: RuntimeError: boom"
    assert len(lines) <= 5
    traceback = out / "error_rank_00001.txt"
    assert lines[-1] == f"  the whole traceback: {traceback}"
    assert 'raise RuntimeError("boom")' in traceback.read_text()


OVERRIDES = {
    "learning_rate": (["--learning-rate", "0.5"], "learning_rate=0.5 and not 0.001"),
    "layout": (["--tp-size", "1", "--dp-size", "2"], "tp_size=1 and not 2, dp_size=2 and not None"),
    "seed": (["--seed", "7"], "seed=7 and not 1337"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_other_settings_are_found_before_the_first_step(
    case: str, markov: Path, tmp_path: Path
) -> None:
    override, told = OVERRIDES[case]
    command = [*FLAGS, "--tp-size", "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    outcome = run(2, command, of_rank={1: override})
    assert outcome.refused, outcome
    assert outcome.complained == (
        f"error: rank 1 has {told} like rank 0; start all ranks with the same flags\n"
    )
    assert "step     1" not in outcome.said


def native_bf16_on_rank_1(rank: int) -> None:
    patch("hardware.measured", "machine", lambda: like(bf16=rank == 1))


def more_threads_on_rank_0(rank: int) -> None:
    patch("training.agreement.torch", "get_num_threads", lambda: 3 - rank)


def other_source_on_rank_1(rank: int) -> None:
    patch("training.agreement", "source_version", lambda: f"source{rank}")


def fast_onednn_on_rank_0(rank: int) -> None:
    patch("hardware.measured", "machine", lambda: like(linear=rank == 0))


def compiled_on_rank_1(rank: int) -> None:
    patch("training.setup", "compiles", lambda *_: (rank == 1, ""))


def a_gpu_on_rank_1(rank: int) -> None:
    patch("launch.process_group", "choose_device", lambda _: torch.device(["cpu", "cuda"][rank]))
    patch("launch.process_group", "gpu_uuid", lambda _: "")


def patch(module: str, name: str, value: object) -> None:
    vars(resolve_name(f"rosetrainer.{module}"))[name] = value


CAME_TO: dict[str, tuple[Callable[[int], None], str]] = {
    "dtype": (
        native_bf16_on_rank_1,
        "dtype=bfloat16 and not float32 like rank 0; start all ranks with --dtype float32",
    ),
    "threads": (
        more_threads_on_rank_0,
        "threads=2 and not 3 like rank 0; start all ranks with --threads 2",
    ),
    "source": (
        other_source_on_rank_1,
        "rosetrainer=source1 and not source0 like rank 0; install the same versions for all ranks",
    ),
    "kernels": (
        fast_onednn_on_rank_0,
        "kernels=layer_norm and not layer_norm,linear like rank 0; start all ranks with "
        "--kernels torch",
    ),
    "compile": (
        compiled_on_rank_1,
        "compile=on and not off like rank 0; start all ranks with --compile off",
    ),
    "device": (
        a_gpu_on_rank_1,
        "device=cuda and not cpu like rank 0; start all ranks with --device cpu, or so many that "
        "each has a GPU of its own",
    ),
}


@pytest.mark.parametrize("what", CAME_TO)
@pytest.mark.parametrize("layout", ["--tp-size", "--dp-size"])
def test_the_same_flags_that_come_to_something_else_are_found_before_the_first_step(
    what: str, layout: str, markov: Path, tmp_path: Path
) -> None:
    prepare, told = CAME_TO[what]
    out = tmp_path / "run"
    dtype = "auto" if what == "dtype" else "float32"
    flags = [layout, "2", "--dtype", dtype, "--threads", "0", "--data", str(markov)]
    outcome = run(2, [*FLAGS, *flags, "--out", str(out)], prepare=prepare)
    assert outcome.refused, outcome
    assert outcome.complained == f"error: rank 1 has {told}\n"
    assert not out.exists(), "nothing was begun"


def test_the_advice_about_dtypes_works_and_a_run_keeps_its_own(
    markov: Path, tmp_path: Path
) -> None:
    """Ranks for which auto means different things go on together with what was begun."""
    command = [*FLAGS, "--dp-size", "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    flags = ["--dtype", "float32"]
    stopped = run(
        2, [*command, *flags], Fault(1, 5, "forward", boom), prepare=native_bf16_on_rank_1
    )
    assert "boom" in stopped.complained
    gone_on = run(2, [*command, "--dtype", "auto"], prepare=native_bf16_on_rank_1)
    assert gone_on.statuses == [0, 0], gone_on.complained
    assert "going on from" in gone_on.said


def test_other_data_are_found_before_the_first_step(markov: Path, tmp_path: Path) -> None:
    from rosetrainer.commands.prepare import main as prepare

    prepare(["markov", "--seed", "5", "--out", str(tmp_path / "other")])
    command = [*FLAGS, "--tp-size", "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    outcome = run(2, command, of_rank={1: ["--data", str(tmp_path / "other")]})
    assert outcome.refused, outcome
    assert "rank 1 has data=" in outcome.complained
    assert "train.bin=" in outcome.complained


def test_control_the_same_settings_are_no_difference(markov: Path, tmp_path: Path) -> None:
    command = [*FLAGS, "--tp-size", "2", "--data", str(markov), "--out", str(tmp_path / "run")]
    assert run(2, command, of_rank={1: ["--seed", "1337"]}).statuses == [0, 0]


def test_a_port_in_use_is_named_with_its_flag(markov: Path, tmp_path: Path) -> None:
    command = [*FLAGS, "--data", str(markov), "--out", str(tmp_path / "run")]
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            RENDEZVOUS_DIR: "",
        }
        outcome = run(2, command, environment=address)
    assert outcome.refused, outcome
    assert f"error: port {port} is in use on this machine" in outcome.complained
    assert "--master-port" in outcome.complained
    assert outcome.complained.count("error: ") == 1


def test_of_two_runs_in_one_folder_the_second_names_the_first(markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*FLAGS, "--data", str(markov), "--out", str(out)]
    first = launch(2, [*command, "--steps", "100000"])
    first.wait_for(lambda: (out / "step_000002").exists())
    second = run(1, [*command, "--steps", "100000"])
    assert second.statuses == [2], second
    holder = first.processes[0].pid
    assert f"error: {out} is in use by process {holder} on " in second.complained
    first.send(signal.SIGTERM)
    assert first.wait().statuses == [0, 0]
    again = launch(1, [*command, "--steps", "100000"])
    again.wait_for(lambda: "going on" in again.said_so_far)
    again.send(signal.SIGTERM)
    assert again.wait().statuses == [0]
