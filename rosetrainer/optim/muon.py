"""Muon for the matrices between embedding and head, AdamW for everything else.

Shape letters: n matrices of one shape, r rows, c columns.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al.): the step of a matrix is
its momentum with all singular values brought near one, by products of matrices alone. The
polynomials are those of "The Polar Express: Optimal Matrix Sign Methods and Their Application to
the Muon Algorithm" (Amsel et al.), each the best after those before it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rosetrainer.optim.adamw import AdamW
from rosetrainer.parallel.sharding import ShardSpec, shard_spec
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.parallel.zero.cut import ZeroSpec
from rosetrainer.parallel.zero.groups import GroupCut

POLYNOMIALS = (  # a s + b s³ + c s⁵, first steep at zero, then flat around one
    (8.2872, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
    (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6690, 0.4188),
)
MARGIN = 1.01  # the first one turns back where singular values are above one, by rounding say
STACK_BYTES = 2**24  # of whole matrices at once: larger stacks are no faster


class Muon(AdamW):
    """One optimizer: groups with "momentum" hold matrices for Muon, all others are AdamW's.

    A cut matrix is gathered first, so that every layout makes the same step, and q, k and
    v of a fused projection are matrices of their own. Decay is AdamW's, by the learning rate.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters; the gradients of Muon's matrices are used up."""
        for group in self.param_groups:
            if "momentum" in group:
                self._update_matrices(group)
        super().step()  # passes over what has no gradient

    def _update_matrices(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        gradients, buffers = [], []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, buffers, group["momentum"])  # Nesterov's
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for together in stacks([p for p in parameters if p.numel()]):
            self._apply(together, group["lr"])
        for parameter in parameters:
            parameter.grad = None  # of those too that belong to other ranks

    def _apply(self, parameters: Sequence[nn.Parameter], rate: float) -> None:
        """Gathers the whole matrices of these parameters, and no others, and takes their step."""
        matrices: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            spec = spec_of_step(parameter)
            whole = spec.unshard(parameter.grad, "optimizer")
            matrices += whole.unflatten(0, (spec.stride, -1)).unbind()
            parameter.grad = None
        steps = iter(orthogonalized(matrices))
        for parameter in parameters:
            spec = spec_of_step(parameter)
            whole = torch.cat([next(steps) for _ in range(spec.stride)])
            parameter.sub_(spec.shard(whole), alpha=rate)


def spec_of_step(parameter: nn.Parameter) -> ShardSpec:
    """By which the whole matrix is gathered: over tp, for ZeRO has left it whole on one rank."""
    spec = shard_spec(parameter)
    if not isinstance(spec, ZeroSpec):
        return spec
    cut = spec.shard_cut
    assert isinstance(cut, GroupCut) and cut.owner is not None, "a matrix of Muon's is cut over dp"
    return spec.gathered


def stacks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """All parameters, in lists whose matrices have one shape, standing or lying, and so go through
    the products together. A list of more than one has STACK_BYTES of whole matrices at most.
    """
    of_shape = defaultdict(list)
    for parameter in parameters:
        spec = shard_spec(parameter)
        rows, columns = spec.dense_shape
        of_shape[tuple(sorted((rows // spec.stride, columns)))].append(parameter)
    for alike in of_shape.values():
        chosen: list[nn.Parameter] = []
        held = 0
        for parameter in alike:
            size = math.prod(shard_spec(parameter).dense_shape) * parameter.element_size()
            if chosen and held + size > STACK_BYTES:
                yield chosen
                chosen, held = [], 0
            chosen.append(parameter)
            held += size
        yield chosen


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix (r, c) with its singular values near one, times sqrt(max(1, r/c)).

    The factor makes a step change what a layer puts out by as much, whatever the shape. Matrices
    of one shape, or of that shape lying down, go through the products together.
    """
    together = defaultdict(list)
    for index, matrix in enumerate(matrices):
        together[tuple(sorted(matrix.shape))].append(index)
    found: dict[int, Tensor] = {}
    for indices in together.values():
        flat = [m if m.shape[0] <= m.shape[1] else m.T for m in map(matrices.__getitem__, indices)]
        for index, result in zip(indices, newton_schulz(torch.stack(flat)), strict=True):
            r, c = matrices[index].shape
            found[index] = result if r <= c else result.T * math.sqrt(r / c)
    return [found[index] for index in range(len(matrices))]


def newton_schulz(x: Tensor) -> Tensor:
    """(n, r, c), r <= c: p5(p4(..p1(x))), polynomials that act on singular values.

    Those above a thousandth of the Frobenius norm come to lie between 0.87 and 1.13.
    """
    # A norm below 1e-15 may be wrong, for squares underflow.
    x = x / (MARGIN * x.flatten(1).norm(dim=1).clamp(min=1e-15)[:, None, None])
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def hidden_layers(model: nn.Module) -> list[ColumnParallelLinear | RowParallelLinear]:
    """Whose weights Muon takes: the linear layers, so all matrices but embeddings and head."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]
