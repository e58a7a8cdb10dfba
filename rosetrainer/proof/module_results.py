"""What a module computes in two passes with a step of SGD between, as whole tensors in float64.

The dense module and a rank's part of the parallel one go the same way; of the second each result is
gathered by the shard specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rosetrainer.optim.clip import clip_gradients
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.data_parallel import reduce_gradients
from rosetrainer.proof.tolerances import ParityError
from rosetrainer.proof.trajectory import MOVED, NOISE, Results

OUTPUT, LOSS, GRADIENTS = "output", "loss", "gradients"
NORM, AFTER, AGAIN = "gradient norm", "weights after a step", "gradients after it"
STAGES = (OUTPUT, LOSS, GRADIENTS, NORM, AFTER, AGAIN)


@dataclass
class Plan:
    """Of the one step, measured by the dense module: the norm to clip to, a rate a weight."""

    clip_norm: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)


def run(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(output, loss) of a forward pass."""
    found = module(*inputs)
    if not isinstance(found, Tensor):
        output, loss = found
        return output, loss
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    return found, (found * upstream.to(found.device)).sum()


def results(
    module: nn.Module, inputs: Sequence[Tensor], plan: Plan, context: ParallelContext | None = None
) -> Results:
    """Two passes, and between them a step of SGD. Whole tensors, in float64.

    The dense module has no context, and comes first: it makes the plan of the step.
    """
    found: Results = {}
    specs = {n: getattr(p, "shard_spec", None) for n, p in module.named_parameters()}

    def whole(name: str, local: Tensor) -> Tensor:
        spec, own = specs[name], local.detach().clone()
        return own if spec is None else spec.unshard(own, "checkpoint")

    for stage in (GRADIENTS, AGAIN):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        output, loss = run(module, leaves)
        loss.backward()
        for number, leaf in enumerate(leaves):
            if leaf.grad is not None:
                found[stage, f"gradient of input {number}"] = leaf.grad
        for parameter in module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if context:
            reduce_gradients(module, context)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            found[stage, f"gradient of {name}"] = whole(name, parameter.grad)
        if stage == AGAIN:
            break
        found |= {(OUTPUT, "the output"): output.detach(), (LOSS, "the loss"): loss.detach()}
        if context:
            norm = clip_gradients(module, context, plan.clip_norm)
        else:
            norm = plan_step(module, plan)
        found[NORM, "the gradient norm"] = output.new_tensor(norm)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=plan.rates[name])
                parameter.grad = None
                found[AFTER, f"{name} after a step"] = whole(name, parameter)
    return found


def plan_step(dense: nn.Module, plan: Plan) -> float:
    """Halves the dense module's gradients; returns their norm. Raises ParityError for one of 0."""
    gradients = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    for name, parameter in dense.named_parameters():
        gradient = gradients[name]
        if not gradient.any():
            raise ParityError(
                f"the dense module's loss does not depend on {name}, so nothing is proven of it"
            )
        gradient.mul_(0.5)
        least = max(float(gradient.norm()), NOISE * norm)
        plan.rates[name] = MOVED * float(parameter.detach().norm()) / least
    plan.clip_norm = norm / 2
    return norm
