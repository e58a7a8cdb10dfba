"""Parameters that are not trained, beside those that are.

Levels 1 and 2 leave them as they are: they have neither moments nor gradients. At level 3 they lie
in units of their own, which are gathered and freed as the others are; nothing of them is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rosetrainer.config import ParallelConfig
from rosetrainer.parallel.zero.sharded_model import ShardedModel, units_of
from rosetrainer.parallel.zero.unit import Unit


class PartlyFrozen(ShardedModel):
    """A model sharded at level 3, some parameters of which have no gradient.

    What stands outside of blocks stays gathered until `release`, a block's is freed after its use.
    Through a block that is frozen gradients may still flow to those before it; the one where that
    ends stays for the next micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        units: Sequence[Unit],
        parallel: ParallelConfig,
        frozen: Sequence[tuple[nn.Module, Unit]],
    ) -> None:
        """blocks, units: those that are trained. frozen: in the order of their use, the model
        itself for what stands outside of blocks."""
        self.frozen = [unit for _, unit in frozen]
        self.flows = [False] * len(frozen)  # whether a gradient flows through it
        super().__init__(model, blocks, units, parallel)
        for number, (module, _) in enumerate(frozen):
            module.register_forward_pre_hook(partial(self._before_use, number))
            if module is not model:
                module.register_forward_hook(partial(self._after_use, number))

    def release(self) -> None:
        super().release()
        for unit in self.frozen:
            unit.release(True)

    def _before_use(self, number: int, *_: object) -> None:
        self.frozen[number].gather("forward")
        if self.overlap and number + 1 < len(self.frozen):
            self.frozen[number + 1].start_gather("forward")

    def _after_use(self, number: int, _: nn.Module, __: object, output: Tensor) -> None:
        self.flows[number] = torch.is_grad_enabled() and output.requires_grad
        if self.flows[number]:
            output.register_hook(partial(self._before_gradient, number))
        if not (self.flows[number] and (self.keep or number + 1 == len(self.frozen))):
            self.frozen[number].release(True)

    def _before_gradient(self, number: int, _: Tensor) -> None:
        for unit in self.frozen[number + 1 : number + 2]:
            unit.release(True)
        self.frozen[number].gather("backward")
        if self.overlap and number and self.flows[number - 1]:
            self.frozen[number - 1].start_gather("backward")


def gather_outside(sharded: ShardedModel) -> None:
    """What stands outside of blocks, for those who call parts of the model and not the model."""
    sharded._before_forward(0)
    if isinstance(sharded, PartlyFrozen):
        sharded._before_use(0)


def parts(
    model: nn.Module, blocks: Sequence[nn.Module], trained: bool
) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The parameters that are trained, or not: those outside of blocks with the model, and each
    block's with it; none that has none. So the first trained part may be a block."""
    found = [[p for p in part if p.requires_grad == trained] for part in units_of(model, blocks)]
    return [part for part in zip((model, *blocks), found, strict=True) if part[1]]
