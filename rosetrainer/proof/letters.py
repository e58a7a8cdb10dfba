"""Where a wrong layout goes wrong first: the tensor that has another letter than its layer says.

Between two layers every tensor is I over tp, the same on each rank, with a whole gradient; under
sequence parallelism V, of which a rank has its own tokens (see comm.py). One process tells what it
should be: it computes the same micro-batch beside the ranks. What each rank has only a part of
turns out right once it is summed: then it is P, and a sum is missing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosetrainer.config import IGNORED
from rosetrainer.models.llama import HeadNorm
from rosetrainer.parallel.comm import all_reduce, own_slice
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear
from rosetrainer.proof.trajectory import Proof

OFF = 1e-8  # of the largest value, in float64: far above rounding, far below a missing part
CUT = (ColumnParallelLinear, HeadNorm)  # what they give is cut over tp: V by features or heads


def first_wrong_letter(proof: Proof) -> str | None:
    """A clause that names the first tensor between layers whose letter is wrong, for every rank.

    None where all are right, as where only a weight's gradient is summed wrongly, and in a
    pipeline, whose stages one process does not have.
    """
    context = proof.context
    if context.pp.size > 1 or context.tp.size == 1:
        return None
    right = seen(proof, ParallelContext(device=context.device))
    for what, ours in seen(proof, context).items():
        if clause := wrong_letter(ours, right[what], context):
            return f"the first wrong letter: {what} {clause}"
    return None


def seen(proof: Proof, layout: ParallelContext) -> dict[str, Tensor]:
    """What goes from layer to layer, forward and then backward, in the order in which it is made.

    Of the first micro-batch of this rank, whatever the layout of the model.
    """
    model, found = proof.model(layout, torch.float64), dict[str, Tensor]()
    names = {module: name for name, module in model.named_modules() if name}
    readers: dict[int, str] = {}  # by a tensor's id, the innermost layer that takes it

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        readers.update({id(x): names[module] for x in inputs if isinstance(x, Tensor)})

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() != 3 or isinstance(module, CUT):
            return
        what, kept = f"the output of {names[module]}", output  # kept, for an id is used again
        found[what] = output.detach()

        def backward(gradient: Tensor) -> None:
            reader = readers.get(id(kept), "the output head")
            found[f"the gradient of {what}, which {reader} reads,"] = gradient.detach()

        if output.requires_grad:
            output.register_hook(backward)

    for module in names:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    rows = proof.parts(proof.context)[0]
    *inputs, labels = (tensor[rows] for tensor in proof.batches[0])
    if (labels == IGNORED).all():  # then every gradient is zero
        labels = inputs[-1]
    seed = DropoutSeed(proof.seed, 0, rows.start)
    _, loss = model(*inputs, labels=labels, return_logits=False, seed=seed)
    loss.backward()
    return found


def wrong_letter(ours: Tensor, whole: Tensor, context: ParallelContext) -> str | None:
    """What is wrong with it, on any rank; whole: what one process has."""
    tp = context.tp
    right = own_slice(whole, tp, -2) if tp.sequence_parallel else whole
    if not differs(ours, right, context):
        return None
    if tp.sequence_parallel:
        return "should be V over tp, a rank's own tokens, and is not"
    is_part = not differs(all_reduce(ours, tp, "checkpoint"), whole, context)
    return f"should be I over tp and is {'P, a part of the sum' if is_part else 'not'}"


def differs(ours: Tensor, right: Tensor, context: ParallelContext) -> bool:
    """On any rank; the same answer on all."""
    close = ours.shape == right.shape and (ours - right).abs().max() <= OFF * right.abs().max()
    found = torch.tensor(float(not close), device=context.device)
    for axis in context.axes:
        found = all_reduce(found, axis, "checkpoint", dist.ReduceOp.MAX)
    return bool(found)
