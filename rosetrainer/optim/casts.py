"""bf16 copies of the weights: one of each in a step, whatever micro-batches there are.

Autocast makes one in each forward pass, which keeps its own until its backward pass: the first rank
of a pipeline would hold as many as it has micro-batches under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.hardware.kernels import replaced
from rosetrainer.parallel import overlap, vocab_parallel
from rosetrainer.parallel.pipeline import split_backward

TORCHS_LINEAR, CAST = F.linear, overlap.for_product
CASTING = (overlap, vocab_parallel, split_backward)  # whose own products cast their weights


class _Casts:
    """Its functions are the same ones in every step: torch.compile looks whether they are."""

    def __init__(self) -> None:
        self.linear, self.made = TORCHS_LINEAR, dict[Tensor, Tensor]()  # a parameter: its copy
        casting = dict.fromkeys(((module, "for_product") for module in CASTING), self.for_product)
        self.functions = {(F, "linear"): self.linear_of_copies, **casting}

    def linear_of_copies(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.linear(
            x, self.for_product(weight), None if bias is None else self.for_product(bias)
        )

    def for_product(self, x: Tensor) -> Tensor:
        """As parallel.overlap's; once of a parameter, also where x is that in another shape."""
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(x.device.type):
            return CAST(x)
        parameter = x if x._base is None else x._base
        weight = isinstance(parameter, nn.Parameter) and parameter.numel() == x.numel()
        if not weight or not x.is_contiguous():
            return CAST(x)
        if parameter not in self.made:
            self.made[parameter] = CAST(parameter.detach())
        copy: Tensor = _Copy.apply(parameter, self.made[parameter])
        return copy.view(x.shape)


class _Copy(torch.autograd.Function):
    """The copy as if it was made here: backward goes from the latest operation to the first, and
    gradients through one that was made in an earlier micro-batch would all come last, too late for
    their sums to travel meanwhile."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


CASTS = _Casts()


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """All micro-batches between two updates go inside, under autocast or not; the same numbers."""
    CASTS.linear = F.linear  # another kernel's, perhaps
    try:
        with replaced(CASTS.functions):
            yield
    finally:
        CASTS.made.clear()
