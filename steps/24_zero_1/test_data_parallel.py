"""Gradients that are summed while others are made: one process's, and bitwise as without.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 test_data_parallel.py
"""

from __future__ import annotations

from itertools import product
from unittest import mock

import data_parallel
import torch
from clip import clip_gradients
from config import IGNORED, GPTConfig, ParallelConfig
from dropout import DropoutSeed
from environment import run, say
from model import GPTModel
from oracle import TOLERANCE, worst_difference
from parallel_context import ParallelContext, end_parallel, init_parallel
from sharding import gather_whole, init_weights
from train import global_backward, own_rows

CONFIG = GPTConfig(vocab_size=29, context_length=8, n_layers=2, d_model=12, dropout=0.1)
SMALL = 5_000  # bytes of a bucket: there are several of unequal sizes, and one is a tensor alone
SUM = mock.Mock(wraps=data_parallel.start_all_reduce)


def update(context: ParallelContext) -> tuple:
    """(losses and norms, begun, clipped gradients, weights) of three updates; no bias is zero.

    begun: how many sums of a step have started when a micro-batch has made its last gradient.
    """
    model, begun, figures = GPTModel(CONFIG, context).double(), [], []
    init_weights(model, seed=1)
    for name, parameter in model.named_parameters():
        parameter.data += 0.01 * len(name)
    last = model.position_embedding.weight
    last.register_post_accumulate_grad_hook(lambda _: begun.append(SUM.call_count))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        SUM.reset_mock()
        optimizer.zero_grad()
        ids = (torch.arange(96).view(12, 8) + step) * 46 % 29
        labels = ids.roll(-1, 1).masked_fill(ids % 5 == 1, IGNORED)
        labels[-2:] = IGNORED  # the last rank's last micro-batch has no label at all
        own, own_labels = own_rows((ids, labels), context)
        loss = global_backward(model, (own,), own_labels, context, DropoutSeed(5, step))
        figures += [loss, clip_gradients(model, context, 0.05)]
        optimizer.step()
    return figures, begun, gather_whole(model, gradients=True), gather_whole(model)


@mock.patch.object(data_parallel, "BUCKET_BYTES", SMALL)
@mock.patch.object(data_parallel, "start_all_reduce", SUM)
def main() -> None:
    say(f"world_size: {init_parallel(ParallelConfig(1)).world_size}")
    (expected, _, *dense), found = update(ParallelContext()), {}
    for m, overlap in product((1, 3), (True, False)):
        context = init_parallel(ParallelConfig(1, overlap=overlap, accumulation=m))
        figures, begun, *ours = update(context)
        found[m, overlap] = figures, ours
        worst = max(map(worst_difference, ours, dense))
        torch.testing.assert_close(figures, expected, rtol=TOLERANCE, atol=0)
        n = SUM.call_count
        say(f"{m} micro-batches, overlap {overlap}: max diff vs dense: {worst:.1e}")
        say(f"  sums started when the last gradient is made: {begun[-m:]} of {n}")
        if context.dp.size > 1:
            # All but those of the two tables that a forward pass begins with.
            assert n > 3 and begun == ([0] * (m - 1) + [(n - 2) * overlap]) * 3, (begun, n)
    for m in (1, 3):
        torch.testing.assert_close(found[m, True], found[m, False], rtol=0, atol=0)
    say("overlap on and off: losses, gradients and weights bitwise the same")
    end_parallel()


if __name__ == "__main__":
    run(main)
