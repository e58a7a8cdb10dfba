"""Gradients that are summed over dp while the backward pass makes others: when, in which order, and
bitwise as without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, assert_all_equal, dense_model, gradients, random_batch, tiny_config
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from rosetrainer.config import IGNORED, GPTConfig, ParallelConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel import comm, data_parallel
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.sharding import gather_whole, load_whole
from rosetrainer.proof.reference import ReferenceDropout
from rosetrainer.training.step import compute_gradients

ROWS, ACCUMULATION = 36, 3
SMALL = 9_000  # bytes of a bucket: the tiny model has eight of unequal sizes, and one is a tensor
LAYOUTS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (4, {"dp_size": 4}, {"tied": True}),
    (4, {"dp_size": 2, "sequence_parallel": True, "recompute": "block"}, {"tied": False}),
    (3, {"dp_size": 3}, {"tied": False}),
]


def global_batch(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows count unequally many tokens; those of the last dp rank none in the last micro-batch."""
    input_ids, labels = random_batch(config, ROWS)
    labels[-4:] = IGNORED
    return input_ids, labels


def own_batches(context: ParallelContext, config: GPTConfig) -> list[tuple[Any, ...]]:
    size = ROWS // context.dp.size // ACCUMULATION
    input_ids, labels = global_batch(config)
    firsts = [(i * context.dp.size + context.dp.rank) * size for i in range(ACCUMULATION)]
    return [(f, input_ids[f : f + size], labels[f : f + size]) for f in firsts]


def check_sums(layout: dict[str, Any], changes: dict[str, Any]) -> list[tuple[str, int]]:
    """On one rank: the collectives over dp that were started, in order."""
    config = tiny_config(dropout=0.1, **changes)
    context = init_parallel(ParallelConfig(**layout))
    found, started = {}, []
    start = comm.start_all_reduce

    def spy(buffer: torch.Tensor, axis: Any, phase: str, *more: Any) -> Any:
        if axis is context.dp and phase == "backward":
            started.append(("all_reduce", buffer.numel()))
        return start(buffer, axis, phase, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "start_all_reduce", spy)
        patch.setattr(data_parallel, "BUCKET_BYTES", SMALL)
        for overlap in (True, False):
            begun: list[int] = []  # sums, when the first layer's gradient is made
            model = GPTModel(config, context).double()
            load_whole(model, dense_model(config).state_dict())
            first = model.position_embedding.weight
            first.register_post_accumulate_grad_hook(lambda _, b=begun: b.append(len(started)))
            started.clear()
            chosen = replace(context, parallel=replace(context.parallel, overlap=overlap))
            seed = DropoutSeed(5, 0)
            loss = compute_gradients(model, own_batches(context, config), chosen, seed=seed)
            found[overlap] = gather_whole(model, gradients=True)
            assert len(started) >= 5, started
            assert begun[: ACCUMULATION - 1] == [0] * (ACCUMULATION - 1), "before the last one"
            assert begun[-1] >= 3 if overlap else begun[-1] == 0
            left = {p: len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()}
            assert left.pop(first) == 1 and not any(left.values()), "hooks of a step end with it"
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[True])
    dense = dense_model(config)
    input_ids, labels = global_batch(config)
    _, expected = dense(input_ids, labels=labels, dropout=ReferenceDropout(0.1, 5, 0))
    expected.backward()
    assert abs(loss - expected.item()) <= TOLERANCE * expected.item()
    assert_all_equal(found[True], gradients(dense))
    return started


@pytest.mark.parametrize("ranks, layout, changes", LAYOUTS)
def test_gradients_are_summed_while_others_are_made(
    ranks: int, layout: dict[str, Any], changes: dict[str, Any]
) -> None:
    """In the last micro-batch, bitwise as afterwards, and as one process has them."""
    first, *others = run_ranks(ranks, check_sums, layout, changes)
    assert all(started == first for started in others), "the same order on all ranks"


def test_one_rank_has_nothing_to_sum() -> None:
    model = GPTModel(tiny_config())
    assert data_parallel.GradientSum(model, model.tp).buckets == []


def check_beside_torch() -> None:
    """DistributedDataParallel averages, so each rank's loss is weighed by what it counts."""
    config, context = tiny_config(tied=True), init_parallel(ParallelConfig(dp_size=3))
    theirs = DistributedDataParallel(dense_model(config), bucket_cap_mb=0.01)
    tokens = int((global_batch(config)[1] != IGNORED).sum())
    for index, (_, input_ids, labels) in enumerate(batches := own_batches(context, config)):
        theirs.require_backward_grad_sync = index == ACCUMULATION - 1
        _, loss = theirs(input_ids, labels=labels)
        count = int((labels != IGNORED).sum())
        (loss * count * context.dp.size / tokens).backward()
    model = GPTModel(config, context).double()
    load_whole(model, dense_model(config).state_dict())
    compute_gradients(model, batches, context)
    assert_all_equal(gather_whole(model, gradients=True), gradients(theirs.module))


def test_the_sums_are_those_of_distributed_data_parallel() -> None:
    run_ranks(3, check_beside_torch)
