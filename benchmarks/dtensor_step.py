"""The plain GPT-2 tensor-parallel as PyTorch's own tutorials make it: parallelize_module, DTensor.

Shape letters: D d_model, H heads, K width of a head; n ranks.

Column-parallel then row-parallel, one sum a pair, heads split: the same as ours. The vocabulary's
table stays whole on each rank, which for a small vocabulary saves two sums a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from benchmarks.baseline_recipe import PlainBlock, PlainGPT, plain_optimizer
from benchmarks.plain_step import CLIP, RATE, autocast
from benchmarks.work import Work


def parallelize(model: PlainGPT, mesh: DeviceMesh) -> None:
    """Cuts a model that is the same on every rank, in place."""
    for block in model.blocks:
        assert isinstance(block, PlainBlock)
        heads_together(block.qkv, mesh.size())
        plan: dict[str, ParallelStyle] = {
            "qkv": ColwiseParallel(),
            "out": RowwiseParallel(),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
        block.n_heads //= mesh.size()


@torch.no_grad()
def heads_together(qkv: nn.Linear, ranks: int) -> None:
    """Rows (3, n, H/n, K) -> (n, 3, H/n, K): a contiguous slice is q, k and v of a rank's heads."""
    for parameter in qkv.parameters():
        parameter.copy_(parameter.unflatten(0, (3, ranks, -1)).transpose(0, 1).flatten(0, 2))


def optimizer_of(model: PlainGPT, fused: bool) -> torch.optim.AdamW:
    """plain_optimizer's; the fused kernel takes either DTensors or tensors, so they are apart."""
    optimizer = plain_optimizer(model, RATE)
    if not fused:
        return optimizer
    groups = []
    for group in optimizer.param_groups:
        for cut in (False, True):
            parameters = [p for p in group["params"] if isinstance(p, DTensor) == cut]
            if parameters:
                groups.append({"params": parameters, "weight_decay": group["weight_decay"]})
    return torch.optim.AdamW(groups, lr=RATE, betas=optimizer.defaults["betas"], fused=True)


class DTensorStep:
    """model: PlainGPT with the same weights on every rank, which this cuts."""

    def __init__(
        self,
        work: Work,
        dtype: torch.dtype,
        model: PlainGPT,
        mesh: DeviceMesh,
        fused: bool = False,
    ) -> None:
        self.model = model.double() if dtype == torch.float64 else model
        parallelize(self.model, mesh)
        self.optimizer = optimizer_of(self.model, fused)
        self.batch, self.autocast = work.batch(), autocast(dtype)

    def __call__(self) -> tuple[float, float]:
        with self.autocast():
            loss = self.model(*self.batch)
        loss.backward()
        norm = self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm

    @torch.no_grad()
    def clip(self) -> float:
        """clip_grad_norm_ takes no mixture of DTensors and tensors, so: by the local parts."""
        cut: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter in self.model.parameters():
            gradient = parameter.grad
            assert gradient is not None
            if not isinstance(gradient, DTensor):
                whole.append(gradient)
            elif gradient.placements[0].is_replicate():
                whole.append(gradient.to_local())
            else:
                assert gradient.placements[0].is_shard(), gradient.placements
                cut.append(gradient.to_local())
        square = nn.utils.get_total_norm(cut) ** 2
        dist.all_reduce(square)
        norm = (square + nn.utils.get_total_norm(whole) ** 2).sqrt()
        torch._foreach_mul_(cut + whole, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        return norm.item()
