"""ZeRO beside torch's own: ZeroRedundancyOptimizer and fully_shard, in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle import assert_all_equal, dense_model, tiny_config
from parallel.test_zero import ACCUMULATION, STEPS, built, own_batches
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rosetrainer.config import IGNORED, OptimConfig, ParallelConfig
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.sharding import gather_whole
from rosetrainer.training.step import compute_gradients

CONFIG = tiny_config(d_model=25, d_ff=35)
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.0)


def train_theirs(theirs: nn.Module, optimizer: Any, context: Any, factor: int) -> None:
    """Each rank weighs its loss by the tokens that count; factor: what the sum divides by."""
    for step in range(STEPS):
        batches = own_batches(context, CONFIG, step)
        tokens = torch.tensor(sum(int((labels != IGNORED).sum()) for *_, labels in batches))
        torch.distributed.all_reduce(tokens)
        for index, (_, input_ids, labels) in enumerate(batches):
            is_last = index == ACCUMULATION - 1
            if isinstance(theirs, FSDPModule):
                theirs.set_requires_gradient_sync(is_last)
            else:
                theirs.require_backward_grad_sync = is_last  # type: ignore[assignment]
            _, loss = theirs(input_ids, labels=labels)
            (loss * int((labels != IGNORED).sum()) * factor / int(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_beside(kind: str) -> None:
    level = 1 if kind == "ZeroRedundancyOptimizer" else 3
    context = init_parallel(ParallelConfig(dp_size=3, zero=level))
    dense = dense_model(CONFIG)
    names = [name for name, _ in dense.named_parameters()]
    if level == 1:
        with warnings.catch_warnings():  # its package compiles functions by torch.jit.script
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer
        theirs: Any = DistributedDataParallel(dense, bucket_cap_mb=0.01)
        sharded: Any = ZeroRedundancyOptimizer(theirs.parameters(), torch.optim.AdamW, **ADAMW)
        train_theirs(theirs, sharded, context, context.dp.size)
        expected = dict(zip(names, theirs.parameters(), strict=True))
    else:
        mesh = init_device_mesh("cpu", (3,))
        for module in (*dense.blocks, dense):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        theirs = dense
        train_theirs(theirs, torch.optim.AdamW(dense.parameters(), **ADAMW), context, 1)
        whole = [p.full_tensor() for p in dense.parameters()]  # type: ignore[attr-defined]
        expected = dict(zip(names, whole, strict=True))
    model = built(CONFIG, context)
    optimizer = build_optimizer(model, OPTIM)
    for step in range(STEPS):
        compute_gradients(model, own_batches(context, CONFIG, step), context)
        clip_gradients(model, context, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_all_equal(gather_whole(model), {n: p.detach() for n, p in expected.items()})


@pytest.mark.parametrize("kind", ["ZeroRedundancyOptimizer", "fully_shard"])
def test_three_updates_equal_those_of_torch(kind: str) -> None:
    run_ranks(3, check_beside, kind)
