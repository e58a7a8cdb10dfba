"""When the parts of a model are gathered and freed, and their gradients summed: ZeRO's levels.

Level 1 cuts moments and the update; 2 gradients too, which are summed in each micro-batch; 3
parameters too, gathered a block ahead of their use, forward and backward, and freed after it
("PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", Zhao et al.). In all of them
an optimizer finds slices with their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from config import ParallelConfig
from torch import Tensor, nn
from zero_unit import Unit


class LocalGradients:
    """What check_gradients asks of a model whose gradients are summed already: of each what a rank
    had of it, of which the largest number is kept."""

    def __init__(self, largest: dict[str, Tensor]) -> None:
        self.whole_specs = largest

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.whole_specs.items():
            yield name, SimpleNamespace(grad=value, requires_grad=True)


class ShardedModel:
    """The units of a model: 0 is what stands outside of blocks, the others are a block each.

    A forward pass gathers what it needs, `release` lets all be slices again, and `finish` too.
    Collectives come in the order of the blocks, forward and backward, so on all ranks alike.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        units: Sequence[Unit],
        parallel: ParallelConfig,
    ) -> None:
        """blocks: in the order of their use. units: of what units_of lists."""
        self.level, self.keep, self.overlap = parallel.zero, parallel.zero_keep, parallel.overlap
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.largest: dict[str, Tensor] = {}
        self.units = units
        for number, unit in enumerate(units):
            for parameter in unit.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._made, number))
        for number, block in enumerate(blocks, 1):
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))
        outside = set(units[0].parameters)
        for module in model.modules():
            if module is model or outside & set(module.parameters(recurse=False)):
                module.register_forward_pre_hook(partial(self._before_forward, 0))
        self.missing = [0] * len(units)
        self.expected: list[int] = []
        self.is_last, self.summing = True, units[0]
        self.release()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """loss.backward(), in which gradients are summed over the shards, a unit at a time.

        At level 1 in the last micro-batch only.
        """
        self.is_last = is_last
        self.missing = [len(unit.parameters) for unit in self.units]
        self.expected = list(range(len(self.units)))
        loss.backward()
        assert not any(self.missing), "a parameter has no gradient"

    def finish(self) -> LocalGradients:
        """Ends a step's backward passes: parameters are slices, their gradients summed."""
        self.summing.finish_scatter()
        for unit in self.units:
            unit.finish_step()
        self.release()
        largest, self.largest = self.largest, {}
        return LocalGradients({name: largest[name] for name in self.names.values()})

    def release(self) -> None:
        """Lets all parameters be slices; at level 3 nothing else is held."""
        for unit in self.units:
            unit.release(self.level == 3)

    def _before_forward(self, number: int, *_: object) -> None:
        unit = self.units[number]
        is_first_use = not unit.is_gathered
        unit.gather("forward")
        if self.overlap and is_first_use and number + 1 < len(self.units):
            self.units[number + 1].start_gather("forward")

    def _after_forward(self, number: int, block: nn.Module, _: object, output: Tensor) -> None:
        trains = torch.is_grad_enabled() and output.requires_grad
        if trains:
            output.register_hook(partial(self._before_backward, number))
        is_used_at_once = number + 1 == len(self.units)  # by the backward pass
        if self.level == 3 and not (trains and (self.keep or is_used_at_once)):
            self.units[number].release(True)

    def _before_backward(self, number: int, _: Tensor) -> None:
        self.units[number].gather("backward")
        if self.overlap and number > 1:
            self.units[number - 1].start_gather("backward")

    def _made(self, number: int, _: Tensor) -> None:
        self.missing[number] -= 1
        while self.expected and not self.missing[self.expected[-1]]:
            self._sum(self.expected.pop())

    def _sum(self, number: int) -> None:
        unit = self.units[number]
        self._measure(unit)
        self.summing.finish_scatter()  # first, for it needs memory as long as it is under way
        unit.collect()
        if self.level == 1 and not self.is_last:
            return
        unit.start_scatter()
        self.summing = unit
        if not self.overlap:
            unit.finish_scatter()
        if self.level == 3 and number:
            unit.release(True)

    def _measure(self, unit: Unit) -> None:
        for parameter in unit.parameters:
            assert parameter.grad is not None
            least, most = parameter.grad.aminmax()  # 15 times as fast as an infinity norm
            name, value = self.names[parameter], torch.maximum(-least, most)
            self.largest[name] = torch.maximum(value, self.largest.get(name, value))


def units_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters outside of blocks, then each block's."""
    of_blocks = [list(block.parameters()) for block in blocks]
    inside = {parameter for block in of_blocks for parameter in block}
    return [[p for p in model.parameters() if p not in inside], *of_blocks]


def sharding_of(model: nn.Module) -> ShardedModel | None:
    """How the model is sharded; None at level 0."""
    return getattr(model, "sharded", None)
