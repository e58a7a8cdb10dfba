"""A rank that hangs is named, whichever it is, from its start on; one at work is waited for."""

from __future__ import annotations

import hashlib
import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from faults.harness import CHAOS, FLAGS, Fault, Outcome, freeze, run, sleep_on

from rosetrainer.launch.rank import RENDEZVOUS_DIR

TIMEOUT = 1
COMMAND = [*FLAGS, "--timeout", str(TIMEOUT), "--global-batch-size", "12"]
PHASES = ("import", "start", "layout", "describe")


@contextmanager
def meeting_place(kind: str) -> Iterator[dict[str, str]]:
    """The environment of ranks: our launcher's folder, rank 0's own store, or torchrun's."""
    if kind == "launcher":
        yield {}
        return
    address = {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS_DIR: ""}
    if kind == "rank 0":
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        yield address | {"MASTER_PORT": str(port)}
        return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    yield address | agent


def hurry(hangs: int | None, rank: int) -> None:
    """Ranks that miss another one soon; `hangs` never comes to the others."""
    from rosetrainer.launch import process_group, watch

    for module in (process_group, watch):
        vars(module)["START_SECONDS"] = 3.0
    if rank == hangs:
        sleep_on()


EVERY = [
    (phase, place, rank, act)
    for phase, place, rank, act in itertools.product(
        PHASES, ("launcher", "rank 0", "torchrun"), range(4), (freeze, sleep_on)
    )
    if (phase != "describe" or rank == 0) and (phase != "import" or act is sleep_on)
]
FEW = [
    ("import", "launcher", 1, sleep_on),
    ("import", "rank 0", 0, sleep_on),
    ("import", "rank 0", 2, sleep_on),
    ("start", "torchrun", 0, freeze),
    ("layout", "launcher", 3, freeze),
    ("layout", "rank 0", 0, freeze),
    ("layout", "torchrun", 1, sleep_on),
    ("describe", "rank 0", 0, sleep_on),
]


@pytest.mark.parametrize(("phase", "place", "rank", "act"), EVERY if CHAOS else FEW)
def test_the_rank_that_hangs_before_training_is_named(
    phase: str, place: str, rank: int, act: Any, markov: Path, tmp_path: Path
) -> None:
    ranks = 4 if rank == 3 else random.Random(f"{phase} {place} {rank}").choice([3, 4])
    layout = ["--tp-size", "2", "--dp-size", "2"] if ranks == 4 else ["--dp-size", "3"]
    command = [*COMMAND, *layout, "--data", str(markov), "--out", str(tmp_path / "run")]
    faults = [Fault(rank, 0, phase, act)] if phase != "import" else []
    with meeting_place(place) as environment:
        hang = partial(hurry, rank if phase == "import" else None)
        outcome = run(ranks, command, *faults, prepare=hang, environment=environment, hangs=[rank])
    told = [line for line in outcome.complained.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, outcome
    named = (f"no progress for {TIMEOUT} s: rank {rank} ", f"rank {rank}, which keeps the ")
    assert any(name in told[0] for name in named), told


LONGER = (TIMEOUT, 5, 25)
"""A crowded machine holds up for a second even a rank at work; the claim is about any timeout."""


def trained(attempt: Callable[[int], list[Outcome]]) -> list[Outcome]:
    """The runs of the first timeout with which all ranks of all of them end well."""
    for timeout in LONGER:
        runs = attempt(timeout)
        if all(outcome.statuses == [0, 0] for outcome in runs):
            return runs
    pytest.fail(f"{runs}")


def hash_slowly(timeout: int, rank: int) -> None:
    """On rank 1 the blocks of a file are small, and each takes a quarter of the timeout."""
    if rank != 1:
        return
    from rosetrainer import durable_files

    sha256 = hashlib.sha256

    class SlowHash:
        def __init__(self) -> None:
            self.own = sha256()

        def update(self, block: bytes) -> None:
            time.sleep(timeout / 4)
            self.own.update(block)

        def hexdigest(self) -> str:
            return self.own.hexdigest()

    durable_files.BLOCK_BYTES = 2**11
    vars(durable_files)["hashlib"] = SimpleNamespace(sha256=SlowHash)


@pytest.mark.parametrize("behind", [[], ["--async-checkpoint"]], ids=["held", "behind"])
def test_a_rank_that_hashes_for_longer_than_the_timeout_is_waited_for(
    behind: list[str], markov: Path, tmp_path: Path
) -> None:
    """At each save, and where a run goes on; its file has blocks for three timeouts."""

    def attempt(timeout: int) -> list[Outcome]:
        out = ["--timeout", str(timeout), "--out", str(tmp_path / str(timeout))]
        command = [*COMMAND, *behind, "--dp-size", "2", "--data", str(markov), *out]
        slowly = partial(hash_slowly, timeout)
        return [run(2, [*command, "--steps", steps], prepare=slowly) for steps in ("2", "4")]

    assert "going on from" in trained(attempt)[1].said
    files = tmp_path.glob("*/step_000004/rank_00001.safetensors")
    assert min(file.stat().st_size for file in files) > 11 * 2**11


def burn(timeout: int, *_: object) -> None:
    """Computes, as a compilation does, for three timeouts; no count moves."""
    end = time.monotonic() + 3 * timeout  # not of processor time: a crowded machine gives little
    while time.monotonic() < end:
        sum(range(1000))


@pytest.mark.parametrize("phase", ["forward", "evaluation"])
def test_a_rank_that_computes_for_longer_than_the_timeout_is_waited_for(
    phase: str, markov: Path, tmp_path: Path
) -> None:
    step = {"forward": 1, "evaluation": 4}[phase]

    def attempt(timeout: int) -> list[Outcome]:
        out = ["--timeout", str(timeout), "--out", str(tmp_path / str(timeout))]
        command = [*COMMAND, "--dp-size", "2", "--steps", "4", "--data", str(markov), *out]
        return [run(2, command, Fault(0, step, phase, partial(burn, timeout)))]

    trained(attempt)
