"""The plain GPT-2 data-parallel as torch makes it: DDP, ZeroRedundancyOptimizer, fully_shard.

Each with AdamW's fused kernel, which torch's default is not on a CPU. Every rank has its own rows
of the work's batch.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_step import CLIP, RATE, autocast
from benchmarks.work import Work

ADAMW: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.95), "fused": True}


class DataParallelStep:
    """One update of all ranks: forward, backward, clip, update, and the loss of all."""

    def __init__(self, work: Work, dtype: torch.dtype, model: nn.Module) -> None:
        self.model = model.double() if dtype == torch.float64 else model
        rank, size = dist.get_rank(), dist.get_world_size()
        each = work.batch_size // size
        ids, labels = (tensor[rank * each : (rank + 1) * each] for tensor in work.batch())
        self.batch = ids, labels
        self.autocast = autocast(dtype)
        self.shard(dtype)

    def shard(self, dtype: torch.dtype) -> None:
        """Makes of the model what it is trained as, and the optimizer."""
        self.model = DistributedDataParallel(self.model)
        self.optimizer: Any = torch.optim.AdamW(groups_of(self.model), **ADAMW)

    def __call__(self) -> tuple[float, float]:
        with self.autocast():
            loss = self.model(*self.batch)
        loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(mean)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return mean.item(), whole.item()


class ZeroRedundancyStep(DataParallelStep):
    """DDP, and of the update each rank makes a part."""

    def shard(self, dtype: torch.dtype) -> None:
        with warnings.catch_warnings():  # its package compiles functions by torch.jit.script
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer
        self.model = DistributedDataParallel(self.model)
        groups = groups_of(self.model)
        self.optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **ADAMW)


class FullyShardStep(DataParallelStep):
    """fully_shard of each block and of the whole; in bf16 by its own policy, sums in fp32."""

    def shard(self, dtype: torch.dtype) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if dtype == torch.bfloat16:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            self.autocast = autocast(torch.float32)
        blocks: Any = self.model.blocks
        for module in (*blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(groups_of(self.model), **ADAMW)


class FullyShardAutocastStep(FullyShardStep):
    """As ours computes: parameters travel in fp32, products are in bf16."""

    def shard(self, dtype: torch.dtype) -> None:
        own = self.autocast
        super().shard(torch.float32)
        self.autocast = own


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As plain_optimizer's: matrices decay."""
    parameters: list[Tensor] = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
