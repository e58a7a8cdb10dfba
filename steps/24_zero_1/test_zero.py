"""Slices of moments and updates against one process: norms, gradients, weights and moments.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_zero.py
"""

from __future__ import annotations

import torch
from clip import clip_gradients
from comm import all_reduce
from config import IGNORED, GPTConfig, ParallelConfig
from dropout import DropoutSeed
from environment import run, say
from model import GPTModel
from oracle import TOLERANCE, worst_difference
from parallel_context import ParallelContext, end_parallel, init_parallel
from sharding import gather_whole, init_weights, shard_spec
from train import global_backward, own_rows, shard_model

# 13 is prime to 2 and 4; the two numbers of a bias are fewer than four ranks.
SIZES = {"context_length": 8, "n_heads": 2, "d_head": 5, "d_model": 13, "d_ff": 2}
CONFIG = GPTConfig(vocab_size=29, dropout=0.1, **SIZES)


def update(context: ParallelContext) -> tuple:
    """(losses and norms; clipped gradients, weights and both moments, whole; the bytes of a moment
    on this rank) of three updates; no bias is zero."""
    model, figures = GPTModel(CONFIG, context).double(), []
    init_weights(model, seed=1)
    for name, parameter in model.named_parameters():
        parameter.data += 0.01 * len(name)
    shard_model(model, context)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        adamw.zero_grad()
        ids = (torch.arange(96).view(12, 8) + step) * 46 % 29
        labels = ids.roll(-1, 1).masked_fill(ids % 5 == 1, IGNORED)
        labels[-2:] = IGNORED  # the last rank's last micro-batch has no label at all
        own, own_labels = own_rows((ids, labels), context)
        loss = global_backward(model, (own,), own_labels, context, DropoutSeed(5, step))
        figures += [loss, clip_gradients(model, context, 0.05)]
        adamw.step()
    wholes = [gather_whole(model, gradients=True), gather_whole(model)]
    for moment in ("exp_avg", "exp_avg_sq"):
        pairs = [(n, shard_spec(p), adamw.state[p][moment]) for n, p in model.named_parameters()]
        wholes.append({n: spec.unshard(own, "checkpoint") for n, spec, own in pairs})
    held = sum(state["exp_avg"].nbytes for state in adamw.state.values())
    return figures, wholes, held


def main() -> None:
    world = init_parallel(ParallelConfig(1)).world_size
    say(f"world_size: {world}")
    expected, dense, whole = update(ParallelContext())
    for tp_size, m in ((1, 1), (1, 3), (2, 3))[: 3 if world > 2 else 2]:
        context = init_parallel(ParallelConfig(tp_size, accumulation=m, zero=int(world > 1)))
        figures, ours, held = update(context)
        worst = max(map(worst_difference, ours, dense))
        torch.testing.assert_close(figures, expected, rtol=TOLERANCE, atol=0)
        say(f"tp {tp_size} x dp {context.dp.size}, {m} micro-batches: max diff {worst:.1e}")
        say(f"  bytes of a moment on rank 0: {held} of {whole}")
        entries = context.dp.ledger.entries
        calls = {f"{op} {phase}": t.calls for (op, phase), t in entries.items()}
        say(f"  {calls}")
        if world > 1:
            assert calls["all_gather forward"] == calls["reduce_scatter backward"] == 3 * 3, calls
            assert "all_reduce backward" not in calls, calls
        if tp_size == 1:
            together = all_reduce(torch.tensor(held), context.dp, "checkpoint")
            assert together == whole, "a number has no moment, or has it twice"
    end_parallel()


if __name__ == "__main__":
    run(main)
