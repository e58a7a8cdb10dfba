"""Trains on a corpus whose true loss is known, on a mesh of pipeline, data and tensor parallel.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 train.py --tp-size 1 --zero 1
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from checkpoint import find_start, load, save
from clip import clip_gradients
from comm import all_reduce
from config import IGNORED, ConfigError, GPTConfig, ParallelConfig
from data_parallel import GradientSum, accumulate_gradients, plain_backward, reduce_gradients
from dropout import DropoutSeed, Seed
from environment import Flags, count, run, say, world_from_environment
from non_finite import NonFiniteGradientError, check_gradients
from parallel_context import ParallelContext, end_parallel, init_parallel
from pipeline import Runner, build_model, sum_tied_gradients
from precision import Autocast, autocast_for
from sharding import init_weights, shard_spec
from torch import Tensor, nn
from tqdm import tqdm
from zero_cut import ShardCut, dim_of_slices, shape_of, zero_spec
from zero_unit import Unit

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

    inputs, labels: this rank's rows, which are cut into micro-batches. seed: of the whole batch.
    Raises ConfigError if the loss is not finite, NonFiniteGradientError if a gradient is not.
    """
    units, first = getattr(model, "units", ()), context.dp.rank * len(labels)
    for unit in units:
        unit.gather("forward")
    over_dp = None if units else GradientSum(model, context.dp)
    if context.pp.size > 1:
        seed = seed and replace(seed, first_row=first)
        own = (labels != IGNORED).sum().double()
        tokens = all_reduce(own, context.dp, "forward").clamp(min=1)
        with autocast():
            weighted = Runner(model, (*inputs, labels), tokens, context, seed).run()
        total = all_reduce(weighted, context.dp, "forward").item()
    else:
        parts = torch.arange(len(labels)).tensor_split(context.parallel.accumulation)
        batches = [(first + int(n[0]), *(t[n] for t in inputs), labels[n]) for n in parts]
        sums_meanwhile = over_dp is not None and context.parallel.overlap
        backward = over_dp.backward if sums_meanwhile else plain_backward
        total = accumulate_gradients(model, batches, context, autocast, seed, backward)
    if over_dp:
        over_dp.wait()
    if not math.isfinite(total):
        raise ConfigError(f"the loss is {total}; a learning rate below {LEARNING_RATE} may help")
    check_gradients(model, context)  # before the sum, which gives a nan to every rank
    sum_tied_gradients(model, context.pp)
    for unit in units:
        unit.finish_step()
    reduce_gradients(model, context, over_dp)
    return total


def shard_model(model: nn.Module, context: ParallelContext) -> None:
    """Cuts what stands outside of the blocks, and each block, over dp if context.parallel.zero."""
    if not context.parallel.zero:
        return
    of_blocks = [list(block.parameters()) for block in model.blocks]
    inside = {parameter for block in of_blocks for parameter in block}
    model.units = []
    for parameters in ([p for p in model.parameters() if p not in inside], *of_blocks):
        whole = [shard_spec(p) for p in parameters]
        dims = [dim_of_slices(shape_of(spec.index), context.dp.size) for spec in whole]
        cuts = [ShardCut(context.dp, dim) for dim in dims]
        model.units.append(Unit(parameters, list(map(zero_spec, whole, cuts)), context.dp))


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
    save_every: int = 0,
    out: Path = Path("out"),
    start: Path | None = None,
) -> list[float]:
    """The loss of each step over all ranks, then the validation loss, in nats.

    A step with a gradient that is not finite is skipped; its loss is nan. Raises ConfigError if
    more than max_skipped are, and if the loss is not finite. Saves in `out` after each save_every
    steps, and goes on after the checkpoint `start`, if there is one.
    """
    autocast = autocast_for(dtype, context.device)
    model = build_model(config, context).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    init_weights(model, seed=1)
    shard_model(model, context)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * shard_spec(p).decay} for p in model.parameters()],
        lr=LEARNING_RATE,
    )
    losses = []
    first = load(start, model, optimizer) if start else 0
    bar = tqdm(range(first, steps), unit="step", leave=False, disable=context.rank > 0)
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
        else:
            clip_gradients(model, context, max_norm)
            optimizer.step()
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
        if save_every > 0 and (step + 1) % save_every == 0:
            save(out, step + 1, model, optimizer, context)
    for unit in getattr(model, "units", ()):
        unit.gather("forward")
    with torch.no_grad(), autocast():
        input_ids, labels = (t.to(context.device) for t in corpus.validation(config.context_length))
        if context.pp.size > 1:
            loss = Runner(model, (input_ids, labels), labels.numel(), context, None).run()
        else:
            _, loss = model(input_ids, labels=labels, return_logits=False)
    return [*losses, loss.item()]


def main() -> None:
    parser = Flags()
    parser.add_argument("--steps", type=count, default=200)
    dtypes = ["float32", "float64", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of matrix products")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tp-size", type=count, help="all ranks unless given; the rest is dp")
    parser.add_argument("--pp-size", type=count, default=1, help="ranks that divide the layers")
    parser.add_argument("--pp-schedule", choices=["afab", "1f1b", "zero-bubble"], default="1f1b")
    parser.add_argument("--micro-batches", type=count, default=4, help="of a pipeline")
    parser.add_argument("--accumulation", type=count, default=1, help="micro-batches of a rank")
    parser.add_argument("--zero", type=int, choices=[0, 1], default=0, help="1 cuts moments")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--recompute", choices=["none", "attention", "block"], default="none")
    parser.add_argument("--dropout", type=float, default=0.0, help="from 0 to below 1")
    parser.add_argument("--max-skipped", type=int, default=0, help="steps that may be skipped")
    parser.add_argument("--max-norm", type=float, default=1.0, help="0 does not clip")
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0 never saves")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the newest in --out")
    flags = parser.parse_args()
    how = (flags.sequence_parallel, flags.recompute, not flags.no_overlap)
    how += (flags.pp_size, flags.pp_schedule, flags.micro_batches, flags.accumulation, flags.zero)
    parallel = ParallelConfig(flags.tp_size, None, *how)
    tp_size, dp_size = parallel.resolve(world_from_environment()[1])
    corpus = MarkovCorpus()
    config = GPTConfig(vocab_size=corpus.alphabet, dropout=flags.dropout)
    config.check(tp_size, flags.sequence_parallel)
    if ROWS % dp_size:
        raise ConfigError(f"dp_size={dp_size} cannot share {ROWS} rows; it can be 1, 2, 4, 8 or 16")
    rows, p = ROWS // dp_size, flags.pp_size
    if p > 1 and (p > config.n_layers or flags.micro_batches > rows or flags.save_every):
        raise ConfigError(f"at most {config.n_layers} stages, {rows} micro-batches, no checkpoints")
    if flags.accumulation > rows:
        raise ConfigError(f"accumulation={flags.accumulation}: a rank has {rows} rows to divide")
    if flags.zero and (dp_size == 1 or p > 1 or flags.save_every):
        raise ConfigError(f"zero={flags.zero} needs dp_size > 1, no pipeline and no checkpoints")
    start = find_start(flags.out, flags.resume, flags.save_every)
    context = init_parallel(parallel, flags.device)
    say(f"{tp_size} tensor-parallel x {dp_size} data-parallel ranks: {ROWS // dp_size} rows each")
    if start:
        say(f"goes on after {start}")
    dtype = getattr(torch, flags.dtype)
    rest = (flags.max_norm, flags.max_skipped, flags.save_every, flags.out, start)
    losses = train(config, corpus, flags.steps, context, dtype, *rest)
    first = flags.steps - len(losses[:-1])
    say(f"ln V {math.log(corpus.alphabet):.4f}, floor {corpus.floor:.4f}")
    for step in sorted({0, flags.steps // 4, flags.steps // 2, flags.steps - 1}):
        if step >= first:
            say(f"step {step + 1:4d}/{flags.steps}  loss {losses[step - first]:.8f}")
    say(f"val loss {losses[-1]:.8f}, {losses[-1] - corpus.floor:.4f} nats above the floor")
    end_parallel()


if __name__ == "__main__":
    run(main)
