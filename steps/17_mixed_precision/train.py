"""Trains on a corpus whose true loss is known, on a mesh of data-parallel x tensor-parallel ranks.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=4 train.py --tp-size 2
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from clip import clip_gradients
from comm import all_reduce, all_reduce_
from config import IGNORED, ConfigError, GPTConfig, ParallelConfig
from dropout import DropoutSeed, Seed
from environment import Flags, count, run, say, world_from_environment
from model import GPTModel
from non_finite import NonFiniteGradientError, check_gradients
from parallel_context import ParallelContext, end_parallel, init_parallel
from precision import Autocast, autocast_for
from sharding import init_weights, shard_spec
from torch import Tensor, nn
from tqdm import tqdm

from data import MarkovCorpus

LEARNING_RATE = 3e-3
ROWS = 16  # of the global batch: the work of a step does not depend on the number of ranks


def global_backward(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    context: ParallelContext,
    seed: Seed = None,
    autocast: Autocast = nullcontext,
) -> float:
    """Leaves the global batch's gradient in .grad and returns its mean loss, in nats.

    inputs, labels: this rank's rows. Every token of the global batch weighs the same, so a rank's
    mean counts by its share of the tokens, and gradients are summed. seed: of the whole batch.
    Raises ConfigError if the loss is not finite, NonFiniteGradientError if a gradient is not.
    """
    seed = seed and replace(seed, first_row=seed.first_row + context.dp.rank * len(labels))
    own = (labels != IGNORED).sum().double()
    share = own / all_reduce(own, context.dp, "forward").clamp(min=1)
    with autocast():
        _, loss = model(*inputs, labels=labels, return_logits=False, seed=seed)
    weighted = loss * share.to(loss.dtype)
    total = all_reduce(weighted, context.dp, "forward").item()
    if not math.isfinite(total):
        raise ConfigError(f"the loss is {total}; a learning rate below {LEARNING_RATE} may help")
    weighted.backward()
    check_gradients(model, context)
    reduce_gradients(model, context)
    return total


def reduce_gradients(model: nn.Module, context: ParallelContext) -> None:
    """Sums each gradient over the axes on which its shard spec says that it is partial."""
    for axis in context.axes:
        specs = {p: shard_spec(p) for p in model.parameters()}
        partial = [p.grad for p, spec in specs.items() if spec.is_partial(axis)]
        if axis.size > 1 and partial:
            flat = torch.cat([gradient.flatten() for gradient in partial])
            parts = all_reduce_(flat, axis, "backward").split([g.numel() for g in partial])
            for gradient, summed in zip(partial, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))


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
    max_norm: float = 1.0,
    max_skipped: int = 0,
) -> list[float]:
    """The loss of each step over all ranks, then the validation loss, in nats.

    A step with a gradient that is not finite is skipped; its loss is nan. Raises ConfigError if
    more than max_skipped are, and if the loss is not finite.
    """
    autocast = autocast_for(dtype, context.device)
    model = GPTModel(config, context).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * shard_spec(p).decay} for p in model.parameters()],
        lr=LEARNING_RATE,
    )
    losses = []
    bar = tqdm(range(steps), unit="step", leave=False, disable=context.rank > 0)
    for step in bar:
        input_ids, labels = own_rows(corpus.batch(step, ROWS, config.context_length), context)
        optimizer.zero_grad()
        seed = DropoutSeed(1, step)
        try:
            losses.append(global_backward(model, (input_ids,), labels, context, seed, autocast))
        except NonFiniteGradientError as error:
            losses.append(math.nan)
            skipped = sum(map(math.isnan, losses))
            say(f"step {step + 1} is skipped: {error}")
            if skipped > max_skipped:
                stop = f"steps skipped: {skipped}, max_skipped={max_skipped}; {error}"
                raise ConfigError(stop) from None
            continue
        clip_gradients(model, context, max_norm)
        optimizer.step()
        bar.set_postfix_str(f"loss {losses[-1]:.4f}")
    with torch.no_grad(), autocast():
        input_ids, labels = (t.to(context.device) for t in corpus.validation(config.context_length))
        _, loss = model(input_ids, labels=labels, return_logits=False)
    return [*losses, loss.item()]


def main() -> None:
    parser = Flags()
    parser.add_argument("--steps", type=count, default=200)
    dtypes = ["float32", "float64", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of matrix products")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tp-size", type=count, help="all ranks unless given; the rest is dp")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--recompute", choices=["none", "attention", "block"], default="none")
    parser.add_argument("--dropout", type=float, default=0.0, help="from 0 to below 1")
    parser.add_argument("--max-skipped", type=int, default=0, help="steps that may be skipped")
    parser.add_argument("--max-norm", type=float, default=1.0, help="0 does not clip")
    flags = parser.parse_args()
    parallel = ParallelConfig(flags.tp_size, None, flags.sequence_parallel, flags.recompute)
    tp_size, dp_size = parallel.resolve(world_from_environment()[1])
    corpus = MarkovCorpus()
    config = GPTConfig(vocab_size=corpus.alphabet, dropout=flags.dropout)
    config.check(tp_size, flags.sequence_parallel)
    if ROWS % dp_size:
        raise ConfigError(f"dp_size={dp_size} cannot share {ROWS} rows; it can be 1, 2, 4, 8 or 16")
    context = init_parallel(parallel, flags.device)
    say(f"{tp_size} tensor-parallel x {dp_size} data-parallel ranks: {ROWS // dp_size} rows each")
    dtype = getattr(torch, flags.dtype)
    losses = train(config, corpus, flags.steps, context, dtype, flags.max_norm, flags.max_skipped)
    say(f"ln V {math.log(corpus.alphabet):.4f}, floor {corpus.floor:.4f}")
    for step in sorted({0, flags.steps // 4, flags.steps // 2, flags.steps - 1}):
        say(f"step {step + 1:4d}/{flags.steps}  loss {losses[step]:.8f}")
    say(f"val loss {losses[-1]:.8f}, {losses[-1] - corpus.floor:.4f} nats above the floor")
    end_parallel()


if __name__ == "__main__":
    run(main)
