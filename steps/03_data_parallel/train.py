"""Trains on a corpus whose true loss is known; each rank takes its own rows of every batch.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 train.py
"""

from __future__ import annotations

import math

import torch
from comm import all_reduce, all_reduce_
from config import IGNORED, ConfigError, GPTConfig
from environment import Flags, count, run, say, world_from_environment
from model import GPTModel, init_weights
from parallel_context import Axis, ParallelContext, end_parallel, init_parallel
from torch import Tensor
from tqdm import tqdm

from data import MarkovCorpus

ROWS = 16  # of the global batch: the work of a step does not depend on the number of ranks


def global_backward(model: GPTModel, input_ids: Tensor, labels: Tensor, dp: Axis) -> float:
    """Leaves the global batch's gradient in .grad and returns its mean loss, in nats.

    input_ids, labels: (B/dp, T), this rank's rows. Every token of the global batch weighs the
    same, so a rank's mean counts by its share of the tokens, and gradients are summed.
    """
    own = (labels != IGNORED).sum().double()
    share = own / all_reduce(own, dp, "forward").clamp(min=1)
    _, loss = model(input_ids, labels=labels, return_logits=False)
    weighted = loss * share.to(loss.dtype)
    weighted.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # one call is faster than 28
    parts = all_reduce_(flat, dp, "backward").split([gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, parts, strict=True):
        gradient.copy_(summed.view_as(gradient))
    return all_reduce(weighted, dp, "forward").item()


def own_rows(batch: tuple[Tensor, Tensor], context: ParallelContext) -> tuple[Tensor, Tensor]:
    """(B, T) each -> (B/dp, T) each: this rank's rows, on its device."""
    own_ids, own_labels = (t.chunk(context.dp.size)[context.dp.rank] for t in batch)
    return own_ids.to(context.device), own_labels.to(context.device)


def train(
    config: GPTConfig,
    corpus: MarkovCorpus,
    steps: int,
    context: ParallelContext,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """The loss of each step over all ranks, then the validation loss, in nats."""
    model = GPTModel(config)
    init_weights(model, seed=1)
    model.to(context.device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    bar = tqdm(range(steps), unit="step", leave=False, disable=context.dp.rank > 0)
    for step in bar:
        batch = own_rows(corpus.batch(step, ROWS, config.context_length), context)
        optimizer.zero_grad()
        losses.append(global_backward(model, *batch, context.dp))
        optimizer.step()
        bar.set_postfix_str(f"loss {losses[-1]:.4f}")
    with torch.no_grad():
        input_ids, labels = (t.to(context.device) for t in corpus.validation(config.context_length))
        _, loss = model(input_ids, labels=labels, return_logits=False)
    return [*losses, loss.item()]


def main() -> None:
    parser = Flags()
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags = parser.parse_args()
    world_size = world_from_environment()[1]
    if ROWS % world_size:
        raise ConfigError(
            f"{ROWS} rows cannot be shared evenly by {world_size} ranks; start 1, 2, 4, 8 or 16"
        )
    context = init_parallel(flags.device)
    corpus = MarkovCorpus()
    config = GPTConfig(vocab_size=corpus.alphabet)
    say(f"{world_size} data-parallel ranks: {ROWS // world_size} rows of each batch for each")
    losses = train(config, corpus, flags.steps, context, getattr(torch, flags.dtype))
    say(f"ln V {math.log(corpus.alphabet):.4f}, floor {corpus.floor:.4f}")
    for step in sorted({0, flags.steps // 4, flags.steps // 2, flags.steps - 1}):
        say(f"step {step + 1:4d}/{flags.steps}  loss {losses[step]:.8f}")
    say(f"val loss {losses[-1]:.8f}, {losses[-1] - corpus.floor:.4f} nats above the floor")
    end_parallel()


if __name__ == "__main__":
    run(main)
