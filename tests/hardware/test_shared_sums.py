"""Sums in shared memory: the same numbers as gloo's, the same bits on all ranks, no rank left."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import random_batch, tiny_config
from ranks import LONGEST_SECONDS, run_ranks
from torch import Tensor

from rosetrainer.config import ParallelConfig
from rosetrainer.hardware import gloo_sums, shared_memory, shared_sums
from rosetrainer.hardware.shared_sums import FOUND, SharedSums, open_sums
from rosetrainer.launch.errors import explain
from rosetrainer.launch.watch import WAITING
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.reporting.messages import describe
from rosetrainer.training import step

SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN
START = SharedSums.start
TIME_LIMIT = (socket.SOL_SOCKET, socket.SO_RCVTIMEO)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = [(0,), (1,), (7, 13), (3, 5000)]


@pytest.fixture
def two() -> Iterator[list[SharedSums]]:
    """Both ranks of a group, in this process."""
    memory = torch.zeros(2**16, dtype=torch.uint8)
    ends = socket.socketpair()
    yield [SharedSums(memory, [end], rank) for rank, end in enumerate(ends)]
    for end in ends:
        end.close()


def started(ranks: list[SharedSums], *values: float) -> tuple[list[Tensor], list[Any]]:
    tensors = [torch.full((3,), value) for value in values]
    return tensors, [r.start(t, SUM) for r, t in zip(ranks, tensors, strict=True)]


def test_a_rank_that_is_late_still_finds_what_the_others_have_copied(two: list[SharedSums]) -> None:
    first, works = started(two, 1.0, 2.0)
    works[0].wait()
    second = torch.full((3,), 16.0)
    two[0].start(second, SUM)  # while rank 1 has not yet read the first
    works[1].wait()
    assert [t.tolist() for t in first] == [[3.0] * 3] * 2


def test_of_two_sums_under_way_the_first_is_ended_first(two: list[SharedSums]) -> None:
    sums = [started(two, 1.0, 2.0) for _ in range(2)]
    for tensors, works in reversed(sums):
        for work in works:
            assert work.wait() and work.wait()
        assert [t.tolist() for t in tensors] == [[3.0] * 3] * 2


@pytest.mark.parametrize("begun", [False, True])
def test_a_rank_that_has_ended_is_an_error_of_the_others(
    two: list[SharedSums], begun: bool
) -> None:
    work = two[0].start(torch.ones(3), SUM) if begun else None
    two[1]._peers[0].close()
    with pytest.raises(RuntimeError, match="Connection closed by peer") as found:
        (work.wait if work else lambda: two[0].start(torch.ones(3), SUM))()
    assert "has lost its connection to another rank" in explain(found.value, None)[0]


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_group_s_limit(
    two: list[SharedSums],
) -> None:
    two[0]._peers[0].setblocking(False)  # as when its time is over
    with pytest.raises(RuntimeError, match="Timed out"):
        two[0].start(torch.ones(3), SUM).wait()


def test_who_waits_there_is_known_to_wait() -> None:
    """To the hang watch, which looks for the innermost file of this package."""
    for module in (gloo_sums, shared_memory, shared_sums):
        assert str(module.__file__).endswith(WAITING)


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def summed(tensor: Tensor, group: Any, op: Any = SUM, by: Any = shared_sums.all_reduce) -> Tensor:
    total = tensor.clone()
    by(total, op=op, group=group, async_op=True).wait()
    return total


def check_sums(world: Any, n: int) -> None:
    """In the order of the ranks, rounded after each, as a loop over their parts does it here."""
    rank = dist.get_rank(world)
    for dtype in DTYPES:
        for shape in SIZES:
            parts = [part(other, shape, dtype) for other in range(n)]
            total = parts[0].clone()
            for other in parts[1:]:
                total += other
            found = summed(parts[rank], world)
            assert torch.equal(found, total)
            exact = torch.stack(parts).double().sum(0).to(dtype)
            torch.testing.assert_close(found, exact, atol=0.05, rtol=0.02)
            gloos = summed(parts[rank], world, by=shared_sums.TORCHS_ALL_REDUCE)
            assert n > 2 or torch.equal(found, gloos)
            largest = summed(parts[rank], world, MAX)
            assert torch.equal(largest, torch.stack(parts).amax(0))


def by_gloo(world: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of these sums, all right, has gone through gloo."""
    gloos, ones, found = mock.Mock(wraps=shared_sums.TORCHS_ALL_REDUCE), torch.ones(1000), []
    sums = {
        "float": (ones, SUM),
        "larger": (torch.ones(1001), SUM),
        "smallest": (ones, MIN),
        "int": (ones.int(), SUM),
    }
    with monkeypatch.context() as patch:
        patch.setattr(shared_sums, "LARGEST", ones.nbytes)
        patch.setattr(shared_sums, "TORCHS_ALL_REDUCE", gloos)
        for what, (tensor, op) in sums.items():
            before = gloos.call_count
            total = summed(tensor, world, op)
            assert total.eq(1 if op == MIN else dist.get_world_size(world)).all()
            found += [what] * (gloos.call_count - before)
    return found


def on_three_ranks() -> str:
    monkeypatch, world = pytest.MonkeyPatch(), dist.group.WORLD
    monkeypatch.setattr(shared_sums, "LARGEST", 2**18)
    assert open_sums(world) == open_sums(world) == open_sums(None) == ""
    check_sums(world, 3)
    assert by_gloo(world, monkeypatch) == ["larger", "smallest", "int"]
    limit = timedelta(seconds=1000.25)
    pair = dist.new_subgroups_by_enumeration([[0, 1], [2]], timeout=limit)[0]
    if dist.get_rank() < 2:
        assert open_sums(pair) == ""
        check_sums(pair, 2)

    apart, off, none = (dist.new_group() for _ in range(3))
    monkeypatch.setattr(shared_memory, "machine", lambda: 1 + dist.get_rank() // 2)
    told = [open_sums(apart), open_sums(off, wanted=False)]
    if dist.get_rank() == 0:
        monkeypatch.delattr(os, "memfd_create")
    told.append(open_sums(none))
    for group in (apart, off, none):
        assert summed(torch.ones(2), group).tolist() == [3.0, 3.0]

    peers = [peer for found in FOUND.values() for peer in getattr(found, "_peers", [])]
    times = [struct.unpack("ll", peer.getsockopt(*TIME_LIMIT, 16)) for peer in peers]
    limits = {(seconds, rest > 0) for seconds, rest in times}  # the kernel rounds up
    own = {(1000, True)} if dist.get_rank() < 2 else set()
    assert limits == own | {(int(LONGEST_SECONDS), False)}
    assert not any(peer.get_inheritable() for peer in peers)
    assert "shared by ranks" in Path("/proc/self/maps").read_text()
    del pair, world, apart, off, none, group
    dist.destroy_process_group()
    gc.collect()
    assert not FOUND and {peer.fileno() for peer in peers} == {-1}
    assert "shared by ranks" not in Path("/proc/self/maps").read_text()
    return "; ".join(told)


def test_sums_of_ranks_on_one_machine_and_why_gloo_makes_the_others() -> None:
    (told,) = set(run_ranks(3, on_three_ranks))
    assert told == ("not on one machine; shared_memory=off; no memory to share")


def steps_of_both_kinds() -> list[str]:
    """How many sums of a step were shared, and the line of the log: by default, and switched off.
    Both have the same loss and gradients."""
    told, found, config = [], [], tiny_config(vocab_size=200)
    for wanted in (True, False):
        context = init_parallel(ParallelConfig(), "cpu")
        context = replace(context, tp=replace(context.tp, group=dist.new_group()))
        if not wanted:
            step.open_sums(context, wanted)
        model = GPTModel(config, context)
        init_weights(model, 1)
        with mock.patch.object(SharedSums, "start", autospec=True, side_effect=START) as start:
            loss = step.compute_gradients(model, [(0, *random_batch(config, 3))], context)
        line = describe(context, torch.float32, "cpu", step.open_sums(context))
        told.append(f"{start.call_count} sums, {line}")
        found.append([torch.tensor(loss), *(p.grad for p in model.parameters())])
    for shared, gloos in zip(*found, strict=True):
        assert torch.equal(shared, gloos) and shared.count_nonzero()
    return told


def test_the_sums_of_a_step_over_tp_are_these_and_of_two_ranks_bit_for_bit_gloo_s() -> None:
    (on, off), same = run_ranks(2, steps_of_both_kinds)
    assert same == [on, off]
    forward, backward = 7, 5  # two a block each way, the table's, and three small ones of the loss
    ranks = "sums, 2 ranks: tensor parallel 2 x data parallel 1, on CPU with gloo"
    assert on == f"{forward + backward} {ranks}, tp in shared memory, 1 thread each, float32"
    assert off == (
        f"0 {ranks} (no shared memory for tp: shared_memory=off), 1 thread each, float32"
    )
