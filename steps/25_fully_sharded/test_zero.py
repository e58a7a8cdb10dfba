"""Slices of parameters, gradients and moments against one process, at each of ZeRO's levels.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_zero.py
"""

from __future__ import annotations

from itertools import product

import torch
from clip import clip_gradients
from config import IGNORED, GPTConfig, ParallelConfig
from dropout import DropoutSeed
from environment import run, say
from model import GPTModel
from oracle import TOLERANCE, worst_difference
from parallel_context import ParallelContext, end_parallel, init_parallel
from sharded_model import sharding_of
from sharding import gather_whole, init_weights, shard_spec
from torch import nn
from train import global_backward, own_rows, shard_model

# 13 is prime to 2 and 4: slices differ by a row.
SIZES = {"context_length": 8, "n_layers": 4, "n_heads": 2, "d_head": 5, "d_model": 13, "d_ff": 66}
CONFIG = GPTConfig(vocab_size=29, dropout=0.1, **SIZES)
LEVELS = [(0, False, True), (1, False, True), (2, False, True), (3, False, True)]
LEVELS += [(3, True, True), (3, False, False)]  # level, what is kept, overlap


def update(context: ParallelContext) -> tuple:
    """(losses and norms; clipped gradients, weights and both moments, whole; bytes on this rank) of
    three updates; no bias is zero.

    bytes: of parameters, sharded and gathered, in each block's forward pass, and at the end.
    """
    model, figures = GPTModel(CONFIG, context).double(), []
    init_weights(model, seed=1)
    for name, parameter in model.named_parameters():
        parameter.data += 0.01 * len(name)
    shard_model(model, context)
    held: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: held.append(bytes_of_parameters(model)))
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
    return figures, wholes, [*held[-4:], bytes_of_parameters(model)]


def bytes_of_parameters(model: nn.Module) -> int:
    units = model.sharded.units if sharding_of(model) else []
    tensors = [t for unit in units for t in (unit.row, *unit.whole)] or model.parameters()
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def expected_calls(context: ParallelContext) -> dict[str, int]:
    """Of a step: parameters outside of blocks are gathered once, a block's as often as used."""
    how, blocks = context.parallel, SIZES["n_layers"]
    m, each = how.accumulation, how.accumulation if how.zero == 3 else 1
    again = (blocks - 1) * m if how.zero == 3 and not how.zero_keep else 0  # not the last block's
    sums = (1 + blocks) * (m if how.zero > 1 else 1)
    calls = {"all_gather forward": 1 + blocks * each, "all_gather backward": again}
    return {name: 3 * n for name, n in (calls | {"reduce_scatter backward": sums}).items() if n}


def main() -> None:
    world, found = init_parallel(ParallelConfig(1)).world_size, {}
    say(f"world_size: {world}")
    expected, dense, whole = update(ParallelContext())
    say(f"bytes of parameters: {whole[-1]}")
    for m, (zero, keep, overlap) in product((1, 3), LEVELS if world > 1 else LEVELS[:1]):
        how = {"overlap": overlap, "accumulation": m, "zero": zero, "zero_keep": keep}
        context = init_parallel(ParallelConfig(2 if world > 2 else 1, **how))
        *found[m, zero, keep, overlap], held = figures, ours, _ = update(context)
        worst = max(map(worst_difference, ours, dense))
        torch.testing.assert_close(figures, expected, rtol=TOLERANCE, atol=0)
        say(f"zero {zero}, keep {keep}, overlap {overlap}, {m} micro-batches: max diff {worst:.1e}")
        say(f"  bytes in blocks 0 to 3 and between steps: {held}")
        calls = {f"{op} {phase}": t.calls for (op, phase), t in context.dp.ledger.entries.items()}
        moved = {name: n for name, n in calls.items() if name.endswith("ward")}
        assert (held[-1] < held[0] == held[3]) == (zero == 3 and not keep), held
        assert moved == (expected_calls(context) if zero else moved), moved
    for m, first in product((1, 3), found):
        if first[0] == m and first[1] == 3:
            torch.testing.assert_close(found[first], found[m, 2, False, True], rtol=0, atol=0)
    say("level 3, kept or not, with overlap or without: bitwise level 2")
    end_parallel()


if __name__ == "__main__":
    run(main)
