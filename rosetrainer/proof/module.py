"""Any module beside its dense twin: does the tensor-parallel one compute the same?

For a model that is none of ours. Both are ordinary modules with parameters of the same names and a
forward pass of the same arguments; of the parallel one each rank has its part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosetrainer.parallel.comm import all_reduce, broadcast_
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.sharding import ShardSpec, load_whole, shard_spec
from rosetrainer.proof.module_results import (
    GRADIENTS,
    LOSS,
    NORM,
    OUTPUT,
    STAGES,
    Plan,
    results,
)
from rosetrainer.proof.tolerances import BOUND, Difference, ParityError, check_traffic
from rosetrainer.proof.trajectory import NOISE, Results
from rosetrainer.validation import ConfigError

HINTS = {  # by the first stage that is wrong
    OUTPUT: "a sum or a bias taken twice or not at all, a mask, the order of a fused weight",
    LOSS: "the output is right: is the loss made of a slice, or of padding?",
    GRADIENTS: "the forward pass is right: a sum that backward lacks, or takes twice",
    NORM: "each gradient is right: do the shard specs say truly what is cut?",
}
GROUP_SECONDS = 300.0  # the time limit of a collective over some of the ranks

Build = Callable[[ParallelContext], nn.Module]


@dataclass(frozen=True)
class Compared:
    """A module at one tp size against its dense twin, the same on all ranks."""

    tp_size: int
    differences: list[Difference]
    held: float  # of the weights' numbers, the share that a rank holds
    payload_bytes: int  # of the collectives over tp, in two forward and backward passes

    def worst(self, stage: str) -> float:
        return max(d.worst for d in self.differences if d.stage == stage)

    @property
    def wrong(self) -> list[Difference]:
        """Of the first stage that has some, worst first."""
        for stage in STAGES:
            found = [d for d in self.differences if d.stage == stage and not d.worst <= BOUND]
            if found:
                return sorted(found, key=lambda d: -d.worst)
        return []


def prove_module(
    build: Build, dense: nn.Module, inputs: Sequence[Tensor], context: ParallelContext
) -> None:
    """Rank 0 prints how far build(context) is from `dense`, at each tp size that divides the ranks.

    build: makes this rank's part of the tensor-parallel module; what its parameters hold at first
    does not matter, all are given the weights of `dense`, in float64. Parameters have the same
    names and, by their shard specs, the same whole shapes; `mark_replicated` gives specs to those
    that are not cut.
    inputs: what both are called with. A module gives a tensor, or a tensor and a scalar loss; where
    it gives no loss, that is the output times random numbers, summed. Outputs are whole on each
    rank.
    context: all ranks in tp, as init_tensor_parallel() makes it.

    Compared are the output, the loss, the gradient of every parameter and of every input that is
    not an integer, the gradient norm, and after one step of SGD in which clipping bites the
    weights, and the gradients again: max|a - b| <= 1e-10 x max|dense|. Dropout is off. Weights that
    are all alike, as biases of 0 are, get noise, so that a mistake with them shows.

    Raises ParityError, on every rank, if something differs, and if the proof would be none: the
    loss does not depend on a parameter, nothing is cut, nothing moves over tp. Raises ConfigError
    if parameters do not fit each other, or one has no shard spec.
    """
    if context.tp.size != context.world_size or context.tp.sequence_parallel:
        raise ConfigError(
            f"prove_module needs all {context.world_size} ranks in tp, and not sequence-parallel; "
            "make the context by init_tensor_parallel()"
        )
    dense, inputs = alike_on_all_ranks(dense, inputs, context)
    plan, weights = Plan(), {n: p.detach().clone() for n, p in dense.named_parameters()}
    expected = results(dense, inputs, plan)
    compared = []
    for size in (n for n in range(1, context.tp.size + 1) if context.tp.size % n == 0):
        part = of_size(size, context)
        module = build(part).to(context.device, torch.float64).eval()
        fill(module, dense, weights)
        compared.append(compare(module, inputs, expected, plan, part, context))
    if context.rank == 0:
        print("\n".join(table(compared)), flush=True)
    for one in compared:
        if one.wrong:
            raise ParityError(verdict(one))
    if context.rank == 0:
        print("\nyes: what is left is rounding", flush=True)


def alike_on_all_ranks(
    dense: nn.Module, inputs: Sequence[Tensor], context: ParallelContext
) -> tuple[nn.Module, list[Tensor]]:
    """Copies in float64, those of rank 0; weights that are all alike get noise."""
    dense = copy.deepcopy(dense).to(context.device, torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dense.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(context.device), alpha=0.1)
            broadcast_(parameter.data, context.tp, "checkpoint")
    copies = [one.to(context.device, copy=True).contiguous() for one in inputs]
    exact = [one.double() if one.is_floating_point() else one for one in copies]
    return dense, [broadcast_(one, context.tp, "checkpoint") for one in exact]


def of_size(tp_size: int, context: ParallelContext) -> ParallelContext:
    """A context of tp_size neighbours; there may be several such groups, which do the same."""
    ranks = torch.arange(context.tp.size).view(-1, tp_size)
    if tp_size == 1:
        return ParallelContext(device=context.device)
    if tp_size == context.tp.size:
        return context
    limit = timedelta(seconds=GROUP_SECONDS)
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit)
    return ParallelContext(Axis("tp", tp_size, dist.get_rank(group), group), device=context.device)


def fill(module: nn.Module, dense: nn.Module, weights: dict[str, Tensor]) -> None:
    """The dense module's weights, and the buffers that both have."""
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "shard_spec"):
            raise ConfigError(
                f"{name} has no shard spec; call mark_replicated(module) at the end of the "
                "constructor (rosetrainer.parallel.replicated)"
            )
    load_whole(module, weights)
    buffers = dict(dense.named_buffers())
    for name, buffer in module.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])


def compare(
    module: nn.Module,
    inputs: Sequence[Tensor],
    expected: Results,
    plan: Plan,
    part: ParallelContext,
    context: ParallelContext,
) -> Compared:
    """Raises ParityError, on every rank, if shapes differ or the layout does nothing."""
    part.tp.ledger.clear()
    ours = results(module, inputs, plan, part)
    specs = [shard_spec(p) for p in module.parameters()]
    if part.tp.size > 1 and not any(spec.is_cut_over(part.tp) for spec in specs):
        raise ParityError(f"tp_size={part.tp.size}, but every rank holds every weight whole")
    check_traffic(part)
    ratios = []
    for (stage, what), right in expected.items():
        found = ours[stage, what]
        if found.shape != right.shape:
            raise ParityError(
                f"{what} has shape {tuple(found.shape)} at tp_size={part.tp.size}, that of the "
                f"dense module {tuple(right.shape)}"
            )
        size = right.abs().max()
        if what.startswith("gradient of "):
            largest = max(r.abs().max() for (s, w), r in expected.items() if s == stage)
            size = size.clamp(min=NOISE * float(largest))
        off = (found - right).abs().max()
        ratio = off / size if off else off  # 0 of 0 is equal
        ratios.append(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf))
    worst = all_reduce(torch.stack(ratios), context.tp, "checkpoint", dist.ReduceOp.MAX)
    pairs = zip(expected, worst.tolist(), strict=True)
    own = sum(map(held, specs))
    whole = sum(math.prod(spec.dense_shape) for spec in specs)
    phases = ("forward", "backward")
    moved = [t.payload_bytes for (_, phase), t in part.tp.ledger.entries.items() if phase in phases]
    differences = [Difference(*key, ratio) for key, ratio in pairs]
    return Compared(part.tp.size, differences, own / whole, sum(moved))


def held(spec: ShardSpec) -> int:
    """How many of the whole tensor's numbers this rank holds: pad is none of it."""
    return math.prod(
        max(min(own.stop, n) - own.start, 0) for own, n in zip(spec.index, spec.shape, strict=True)
    )


def table(compared: list[Compared]) -> Iterator[str]:
    """A line a stage, a column a tp size: the worst difference / the largest value of the dense."""
    tensors = len([d for d in compared[0].differences if d.stage == GRADIENTS])
    names = dict(zip(STAGES, STAGES, strict=True)) | {GRADIENTS: f"gradients of {tensors} tensors"}
    yield "  " + " " * 27 + "".join(f"tp {c.tp_size:<8}" for c in compared) + "allowed"
    for stage, name in names.items():
        found = "".join(f"{c.worst(stage):<11.1e}" for c in compared)
        yield f"  {name:27}{found}{BOUND:.1e}"
    shares = "".join(f"{c.held:<11.0%}" for c in compared)
    yield f"  {'weights on a rank':27}{shares}".rstrip()
    sent = "".join(f"{f'{c.payload_bytes / 2048:.1f} KiB':11}" for c in compared)
    yield f"  {'over tp in a pass':27}{sent}".rstrip()


def verdict(one: Compared) -> str:
    worst = one.wrong[0]
    hint = HINTS.get(worst.stage, "the first pass is right, and the step is not")
    if one.tp_size == 1:
        hint = "on one rank, so before anything is divided: the two are not the same module"
    return (
        f"not the same as the dense module at tp_size={one.tp_size}: {worst.what} differs by "
        f"{worst.worst:.1e} of its largest value; {hint}"
    )
