"""A pipeline against one process: loss, norm and clipped gradients; what each rank holds at once.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_pipeline.py
"""

from __future__ import annotations

from itertools import product

import torch
from clip import clip_gradients
from config import IGNORED, GPTConfig, ParallelConfig
from dropout import DropoutSeed
from environment import run, say
from oracle import TOLERANCE, worst_difference
from parallel_context import ParallelContext, end_parallel, init_parallel, init_tensor_parallel
from pipeline import build_model
from schedule import length, make_schedule
from sharding import init_weights
from train import global_backward

# Three layers, which two ranks share unevenly; eight micro-batches of 15 rows are not alike either.
CONFIG = GPTConfig(vocab_size=139, context_length=8, n_layers=3, d_model=16, dropout=0.1)


def update(context: ParallelContext) -> tuple:
    """(model, loss, norm, gradients, which are clipped by then); no bias is zero."""
    model = build_model(CONFIG, context).double()
    init_weights(model, seed=1)
    for name, parameter in model.named_parameters():
        parameter.data += 0.01 * len(name)
    ids = torch.arange(120).view(15, 8) * 46 % 139
    labels = ids.roll(-1, 1).masked_fill(ids % 5 == 1, IGNORED)
    labels[3:6] = IGNORED  # a micro-batch of five has no label at all
    loss = global_backward(model, (ids,), labels, context, DropoutSeed(5, 3))
    norm = clip_gradients(model, context, 0.05)
    return model, loss, norm, {name: p.grad for name, p in model.named_parameters()}


def main() -> None:
    p = init_tensor_parallel().world_size
    say(f"world_size: {p}")
    _, *expected, dense = update(ParallelContext())
    for m, name in product((1, 3, 5, 8) if p > 1 else (), ("afab", "1f1b", "zero-bubble")):
        context = init_parallel(ParallelConfig(1, 1, pp_size=p, pp_schedule=name, micro_batches=m))
        model, *found, own = update(context)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=0)
        worst = worst_difference(own, {name: dense[name] for name in own})
        held = {"afab": m, "1f1b": min(p - context.pp.rank, m), "zero-bubble": min(p, m)}[name]
        assert model.most_kept == held, f"{name} holds {model.most_kept}, expected {held}"
        say(f"{name}, {m} micro-batches: max grad diff vs dense: {worst:.1e}, rank 0 holds {held}")
    for name, ranks, m in product(("afab", "1f1b", "zero-bubble"), (2, 4), (8, 16)):
        took = length(make_schedule(name, ranks, m))
        assert took == 3 * m + (ranks - 1) * (1 if name == "zero-bubble" else 3), took
        say(f"{name}, {ranks} ranks, {m} micro-batches: {took} units, {took - 3 * m} of them idle")
    end_parallel()


if __name__ == "__main__":
    run(main)
