"""Proof on demand: who holds what, and whether this layout computes what one process does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rosetrainer.blocks import build_model
from rosetrainer.comm import all_reduce
from rosetrainer.config import IGNORED, GPTConfig, ParallelConfig
from rosetrainer.data_parallel import accumulate_gradients
from rosetrainer.dropout import DropoutSeed
from rosetrainer.environment import world_from_environment
from rosetrainer.fields import Count, check_fields
from rosetrainer.flags import parse_flags, ranks_to_start
from rosetrainer.launch import launch
from rosetrainer.model import GPTModel
from rosetrainer.model_size import check_fits
from rosetrainer.parallel_context import ParallelContext, end_parallel, init_parallel
from rosetrainer.performance import choose_dtype, set_threads
from rosetrainer.precision import autocast_for
from rosetrainer.process_group import meet
from rosetrainer.products import fast_products
from rosetrainer.reference import ReferenceDropout
from rosetrainer.reference_rotary import build_reference
from rosetrainer.tensor_parallel import draw_whole, gather_whole, load_whole, shard_spec

# Of the largest gradient of all. One below it may be zero in truth: BOUND of it is float64's 1e-16
# times 316, by which a norm over nothing amplifies (1 / sqrt of its 1e-5), times 3 for the sums.
NOISE = 1e-3
BOUND = 1e-10  # of the dense tensor's largest value; float64 rounding stays near 1e-15


@dataclass(frozen=True)
class Difference:
    """The worst |ours - dense| over all ranks, as a fraction of the dense tensor's largest."""

    what: str
    worst: float

    @property
    def is_rounding(self) -> bool:
        return self.worst <= BOUND  # false for nan too


def who_holds_what(model: GPTModel, tp_size: int) -> str:
    """A table: each weight's whole shape, and the slice of it that each tp rank holds."""
    last = model.config.n_layers - 1
    blocks = f"blocks.0-{last}." if last else "blocks.0."
    rows = [("weight", "whole", *(f"rank {rank}" for rank in range(tp_size)))]
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and not name.startswith("blocks.0."):
            continue  # every block is cut alike
        spec = shard_spec(parameter)
        slices = []
        for rank in range(tp_size):
            start = rank * spec.parts // tp_size * spec.width
            end = min(start + spec.width, spec.shape[spec.dim])
            cut = [":"] * len(spec.shape)
            cut[spec.dim] = f"{start}:{end}" if start < end else "pad"
            slices.append("all of it" if spec.parts == 1 else f"[{', '.join(cut)}]")
        whole = " x ".join(map(str, spec.shape))
        rows.append((name.replace("blocks.0.", blocks), whole, *slices))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def prove(
    config: GPTConfig,
    context: ParallelContext,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Difference]:
    """The layout's logits, loss and every gradient, in dtype, against the dense oracle in float64.

    Weights are random, with biases that are not zero; the batch is short, for the oracle is slow.
    Every rank computes the oracle and compares what it holds.
    """
    tp, dp = context.tp, context.dp
    short = max(32 // tp.size, 1) * tp.size  # a length that sequence parallelism can divide
    config = replace(config, context_length=min(config.context_length, short))
    model = build_model(config, context)
    if dtype == torch.float64:
        model.double()
    autocast = autocast_for(dtype, context.device)
    whole = {
        name: draw_whole(replace(shard_spec(p), init_std=shard_spec(p).init_std or 0.1), seed, name)
        for name, p in model.named_parameters()
    }
    load_whole(model, whole)
    dense = build_reference(config).to(context.device).double()
    dense.load_state_dict(whole)

    generator = torch.Generator().manual_seed(seed)
    shape = (2 * dp.size, config.context_length)
    drawn = torch.randint(config.vocab_size, (2, *shape), generator=generator)
    input_ids, labels = drawn.to(context.device)
    labels[0, : shape[1] // 2] = IGNORED  # unequal token counts, so that a mean of means would show
    own = slice(2 * dp.rank, 2 * dp.rank + 2)
    masks = DropoutSeed(seed, step=0)

    dropout = ReferenceDropout(config.dropout, seed)
    dense_logits, dense_loss = dense(input_ids, labels=labels, dropout=dropout)
    dense_loss.backward()
    batch = [(input_ids[own], labels[own])]
    with fast_products(dtype, context.device):
        with torch.no_grad(), autocast():
            logits, _ = model(input_ids[own], seed=replace(masks, first_row=own.start))
        loss = accumulate_gradients(model, batch, context, autocast, masks)
    assert logits is not None
    gradients = gather_whole(model, tp, gradients=True)
    pairs = {
        "logits": (logits, dense_logits[own].detach()),
        "loss": (torch.full_like(dense_loss, loss), dense_loss.detach()),
    }
    expected: dict[str, Tensor] = {}
    for name, parameter in dense.named_parameters():
        assert parameter.grad is not None
        expected[name] = parameter.grad
    pairs |= {f"gradient of {name}": (gradients[name], expected[name]) for name in gradients}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    local = torch.stack([_relative(*pair, NOISE * largest) for pair in pairs.values()])
    for axis in context.axes:
        local = all_reduce(local, axis, "parity", torch.distributed.ReduceOp.MAX)
    return [Difference(what, worst) for what, worst in zip(pairs, local.tolist(), strict=True)]


def _relative(ours: Tensor, dense: Tensor, noise: float) -> Tensor:
    """A float64 scalar; inf where ours is not finite, which a maximum would lose.

    Where the true gradient is 0, both are rounding noise: nothing is held against less than
    `noise`.
    """
    worst = (ours.double() - dense).abs().max() / dense.abs().max().clamp(min=noise)
    return worst.double().nan_to_num(nan=torch.inf)


def show_proof(config: GPTConfig, context: ParallelContext, dtype: torch.dtype) -> None:
    """Rank 0 prints who holds what, and whether it is the same as one process.

    In float64, where rounding and a mistake are far apart, and for comparison in dtype.
    Raises ParityError, on every rank, if it is not.
    """
    wanted = dict.fromkeys((torch.float64, dtype))  # one proof where they are the same
    in_dtypes = {used: prove(config, context, used) for used in wanted}
    differences = in_dtypes[torch.float64]
    speak = print if context.rank == 0 else _keep_quiet
    shapes_only = build_model(config, replace(context, device=torch.device("meta")))
    speak("\nwho holds what\n\n" + who_holds_what(shapes_only, context.tp.size))
    speak("\nsame as one process? worst difference / largest value\n")
    names = (str(used).removeprefix("torch.") for used in in_dtypes)
    speak(f"  {'':26} " + "  ".join(f"{name:8}" for name in names).rstrip())
    for what, group in (
        ("logits", slice(0, 1)),
        ("loss", slice(1, 2)),
        (f"gradients of {len(differences) - 2} tensors", slice(2, None)),
    ):
        worst = (max(d.worst for d in found[group]) for found in in_dtypes.values())
        speak(f"  {what:26} " + "  ".join(f"{w:<8.1e}" for w in worst).rstrip())
    if wrong := [d for d in differences if not d.is_rounding]:
        raise ParityError(
            f"not the same as one process: {wrong[0].what} differs by {wrong[0].worst:.1e} of its "
            f"largest value in float64, where rounding stays under {BOUND:.0e}: a bug"
        )
    speak("\nyes: what is left is rounding\n")


def _keep_quiet(text: str) -> None:
    pass


class ParityError(RuntimeError):
    """This layout computes something else than one process does."""


@dataclass(frozen=True)
class ParityCommand:
    """Shows who holds what, and proves that a layout computes what one process does."""

    model: GPTConfig = field(default_factory=GPTConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """What training would use; float64, which decides, is always shown."""
    nproc: Count | None = None
    """Start this many ranks on this machine; leave it out under torchrun."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    command = parse_flags(ParityCommand, argv, "python -m rosetrainer parity")
    check_fields(command)
    world_size, starts = ranks_to_start("parity", argv, command.nproc, command.parallel)
    tp_size, _ = command.parallel.resolve(world_size)
    command.model.check(tp_size, command.parallel.sequence_parallel)
    if starts:
        return launch(world_size, ["parity", *argv])
    # The one process that every rank compares with: its position table can be a short one.
    dense, here = replace(command.model, context_length=1), world_from_environment()[3]
    check_fits(dense, 16, "one process's float64 weights and gradients on each rank", here)
    set_threads(0)
    meet("cpu")
    context = init_parallel(command.parallel, "cpu")
    show_proof(command.model, context, choose_dtype(command.dtype, context.device))
    end_parallel()
    return 0
