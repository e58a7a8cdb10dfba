"""The plain GPT-2 in stages as torch.distributed.pipelining runs them, each rank's clip over all.

Shape letters: B batch, T context, D d_model, V vocabulary; p ranks, v stages of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks.baseline_recipe import PlainGPT, plain_optimizer
from benchmarks.plain_step import CLIP, RATE, autocast
from benchmarks.work import Work

STAGES_OF_RANK = {"1F1B": 1, "InterleavedZeroBubble": 2}


class PlainStage(nn.Module):
    """(B, T) ids or (B, T, D) of the stage before -> (B, T, D), or of the last one (B, T, V)."""

    def __init__(self, model: PlainGPT, layers: range, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[layer] for layer in layers)
        self.tokens = model.tokens if is_first else None
        self.positions = model.positions if is_first else None
        self.norm = model.norm if is_last else None
        self.head = model.head if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


class PipeliningStep:
    """model: an untied PlainGPT with the same weights on every rank, of which this keeps a part."""

    def __init__(
        self,
        work: Work,
        dtype: torch.dtype,
        model: PlainGPT,
        group: dist.ProcessGroup,
        schedule: str = "1F1B",
        micro_batches: int = 8,
    ) -> None:
        model = model.double() if dtype == torch.float64 else model
        self.rank, p = group.rank(), group.size()
        count = p * STAGES_OF_RANK[schedule]
        each = work.model.n_layers // count
        assert each * count == work.model.n_layers
        own = range(self.rank, count, p)
        self.parts = [
            PlainStage(model, range(n * each, n * each + each), n == 0, n == count - 1) for n in own
        ]
        stages: list[Any] = [
            PipelineStage(part, n, count, torch.device("cpu"), group=group)
            for part, n in zip(self.parts, own, strict=True)
        ]
        cls: Any = get_schedule_class(schedule)
        of_rank = stages[0] if STAGES_OF_RANK[schedule] == 1 else stages
        self.schedule = cls(of_rank, micro_batches, loss_fn=mean_loss)
        self.model, self.group, self.stages = nn.ModuleList(self.parts), group, stages
        self.optimizer = plain_optimizer(self.model, RATE)
        self.batch, self.autocast = work.batch(), autocast(dtype)
        self.is_first, self.is_last = self.rank == 0, self.rank == p - 1

    def __call__(self) -> tuple[float, float]:
        ids, labels = self.batch
        losses: list[Tensor] = []
        inputs = [ids] if self.is_first else []
        target = {"target": labels, "losses": losses} if self.is_last else {}
        with self.autocast():
            self.schedule.step(*inputs, **target)
        loss, norm = self.clip(losses)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def receive_buffers(self) -> list[Tensor]:
        """What a stage keeps from step to step to receive into, of each micro-batch one."""
        infos = [info for s in self.stages for info in (s.args_recv_info, s.grad_recv_info)]
        found = [one.buffer for of_stage in infos for each in of_stage.values() for one in each]
        return [buffer for buffer in found if isinstance(buffer, Tensor)]

    @torch.no_grad()
    def clip(self, losses: list[Tensor]) -> tuple[float, float]:
        """The mean loss and the norm over all stages, which then clips each one's gradients."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        loss = torch.stack(losses).mean() if losses else torch.zeros(())
        both = torch.stack([loss.double(), nn.utils.get_total_norm(gradients).double() ** 2])
        dist.all_reduce(both, group=self.group)
        norm = both[1].sqrt()
        torch._foreach_mul_(gradients, float((CLIP / (norm + 1e-6)).clamp(max=1.0)))
        return both[0].item(), norm.item()


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def untied(model: PlainGPT) -> PlainGPT:
    """With an output head of its own: torch does not sum a table's gradient over two stages."""
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model
