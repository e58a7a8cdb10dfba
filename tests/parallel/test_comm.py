"""The collectives: what each computes forward and backward, and what the ledger says of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import ranks
import torch
from ranks import RankFailure, run_ranks
from torch import Tensor

from rosetrainer.parallel import comm
from rosetrainer.parallel.context import Axis, Ledger, init_tensor_parallel


def check_regions(tp_size: int) -> None:
    context = init_tensor_parallel(tp_size)
    tp, first = context.tp, context.dp.rank * tp_size  # of the ranks of this tp group
    n, r = tp.size, tp.rank

    def drawn(seed: int) -> list[Tensor]:
        """One for each rank of the group; no two of all ranks are alike."""
        seeds = range(seed + first, seed + first + n)
        return [torch.randn(2, 3, generator=torch.Generator().manual_seed(s)) for s in seeds]

    everyone, ups = drawn(0), drawn(100)
    own, up = everyone[r], ups[r]
    wide, wide_up = torch.cat(everyone, -1), torch.cat(ups, -1)
    long, long_up = torch.cat(everyone, -2), torch.cat(ups, -2)
    by_tokens = replace(tp, sequence_parallel=True, ledger=Ledger())

    def both(function, x, upstream, axis=tp):
        x = x.clone().requires_grad_()
        y = function(x, axis)
        y.backward(upstream)
        return y.detach(), x.grad

    y, grad = both(comm.copy_to_tensor_parallel_region, own, up)
    assert torch.equal(y, own)
    torch.testing.assert_close(grad, sum(ups))
    y, grad = both(comm.reduce_from_tensor_parallel_region, own, up)
    torch.testing.assert_close(y, sum(everyone))
    assert torch.equal(grad, up)
    y, grad = both(comm.gather_from_tensor_parallel_region, own, wide_up)
    assert torch.equal(y, wide)
    assert torch.equal(grad, wide_up[:, 3 * r : 3 * r + 3])
    y, grad = both(comm.scatter_to_tensor_parallel_region, wide, up)
    assert torch.equal(y, wide[:, 3 * r : 3 * r + 3])
    assert torch.equal(grad, wide_up)

    y, grad = both(comm.enter_tensor_parallel_region, own, long_up, by_tokens)
    assert torch.equal(y, long)
    torch.testing.assert_close(grad, n * up)  # every rank has the same gradient of the whole
    y, grad = both(comm.leave_tensor_parallel_region, long * (r + 1), up, by_tokens)
    torch.testing.assert_close(y, own * n * (n + 1) / 2)
    torch.testing.assert_close(grad, long_up)
    moved = {key: (t.calls, t.payload_bytes) for key, t in by_tokens.ledger.entries.items()}
    kinds = itertools.product(("all_gather", "reduce_scatter"), ("forward", "backward"))
    assert moved == dict.fromkeys(kinds, (1, 2 * 3 * 4 * n))

    small, large = 2 * 3 * 4, 2 * 3 * 4 * n
    counted = {key: (t.calls, t.payload_bytes) for key, t in tp.ledger.entries.items()}
    assert counted == {
        ("all_reduce", "backward"): (1, small),
        ("all_reduce", "forward"): (1, small),
        ("all_gather", "forward"): (1, large),
        ("all_gather", "backward"): (1, large),
    }


@pytest.mark.parametrize("tp_size", [2, 4])
def test_regions_forward_backward_and_counted(tp_size: int) -> None:
    run_ranks(4, check_regions, tp_size)


def check_primitives(tp_size: int) -> None:
    context = init_tensor_parallel(tp_size)
    tp = context.tp
    n, r = tp.size, tp.rank
    # Not contiguous, and the caller's own: it must come back as it was. Other groups have others.
    x = (torch.arange(12.0).reshape(3, 4) + 1000 * context.dp.rank + 100 * r).T
    before = x.clone()
    total = comm.all_reduce(x, tp, "forward")
    assert torch.equal(total, n * (before - 100 * r) + 100 * n * (n - 1) / 2)
    for dim in (0, 1, -1):
        whole = comm.all_gather(x, tp, "forward", dim)
        parts = [before - 100 * r + 100 * i for i in range(n)]
        assert torch.equal(whole, torch.cat(parts, dim))
        scattered = comm.reduce_scatter(whole, tp, "forward", dim)
        assert torch.equal(scattered, n * before)
    assert torch.equal(x, before)
    first = comm.broadcast_(x.clone().contiguous(), tp, "forward")
    assert torch.equal(first, before - 100 * r)
    assert tp.ledger.entries["broadcast", "forward"].payload_bytes == x.numel() * 4
    sending = comm.start_send(x, tp, (r + 1) % n, "forward")
    received = comm.start_receive(torch.empty(x.shape), tp, (r - 1) % n, "forward").wait()
    assert torch.equal(received, before - 100 * r + 100 * ((r - 1) % n))
    assert torch.equal(sending.wait(), before)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        assert comm.all_reduce(torch.ones(3, dtype=dtype), tp, "forward").eq(n).all()

    assert 0 < tp.ledger.wait_seconds < ranks.LONGEST_SECONDS


@pytest.mark.parametrize("tp_size", [2, 4])
def test_primitives_leave_the_caller_s_tensor_alone(tp_size: int) -> None:
    run_ranks(4, check_primitives, tp_size)


def test_an_axis_of_one_rank_communicates_and_counts_nothing() -> None:
    axis, x = Axis("tp"), torch.arange(6.0).reshape(2, 3)
    for function in (
        comm.copy_to_tensor_parallel_region,
        comm.reduce_from_tensor_parallel_region,
        comm.gather_from_tensor_parallel_region,
        comm.scatter_to_tensor_parallel_region,
    ):
        assert function(x, axis) is x
    alone = Axis("tp", sequence_parallel=True)
    for function in (comm.enter_tensor_parallel_region, comm.leave_tensor_parallel_region):
        assert function(x, alone) is x
    for collective in (comm.all_reduce, comm.all_gather, comm.reduce_scatter, comm.broadcast_):
        assert torch.equal(collective(x, axis, "forward"), x)
    assert not axis.ledger.entries


def test_a_ledger_goes_on_counting_what_was_started() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.record("all_reduce", "forward", 8)
    ledger.clear()
    with ledger.recomputing():
        ledger.record("all_reduce", "forward", 8)
    assert ledger.collectives_started == 4
    assert list(ledger.entries) == [("all_reduce", "recompute")]


def fail_on_rank_one() -> None:
    tp = init_tensor_parallel().tp
    if tp.rank == 1:
        raise ValueError("rank one's own words")
    comm.all_reduce(torch.ones(1), tp, "forward")


def test_the_harness_tells_a_rank_s_own_traceback_and_ends_the_others() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2:\n(.|\n)*rank one's own words"):
        run_ranks(2, fail_on_rank_one)


def exit_silently() -> None:
    import os

    os._exit(7)


def test_the_harness_notices_a_rank_that_dies_without_a_word() -> None:
    with pytest.raises(RankFailure, match="died without a word, exit code 7"):
        run_ranks(2, exit_silently)
