"""bf16 copies of the weights: one of each in a step, whatever micro-batches there are.

Autocast makes one in each forward pass, which keeps its own until its backward pass: the first rank
of a pipeline would hold as many as it has micro-batches under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.hardware.kernels import replaced
from rosetrainer.parallel import overlap, vocab_parallel
from rosetrainer.parallel.pipeline import split_backward

TORCHS_LINEAR, CAST = F.linear, overlap.for_product
NUMBERS_AT_ONCE = 2**17  # of a gradient that is added: in fp32 they stay in a CPU's cache
CASTING = (overlap, vocab_parallel, split_backward)  # whose own products cast their weights


class _Casts:
    """Its functions are the same ones in every step: torch.compile looks whether they are."""

    def __init__(self) -> None:
        self.linear, self.made = TORCHS_LINEAR, dict[Tensor, Tensor]()  # a parameter: its copy
        self.adds = False
        casting = dict.fromkeys(((module, "for_product") for module in CASTING), self.for_product)
        self.functions = {(F, "linear"): self.linear_of_copies, **casting}

    def linear_of_copies(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        given = [weight] if bias is None else [weight, bias]
        found = [pair for pair in map(self.copy_of, given) if pair]
        if len(found) < len(given):
            return self.linear(x, *map(self.for_product, given))
        y: Tensor = _Linear.apply(CAST(x), self.adds, *chain.from_iterable(found))
        return y

    def for_product(self, x: Tensor) -> Tensor:
        """As parallel.overlap's; once of a parameter, also where x is that in another shape."""
        pair = self.copy_of(x)
        y: Tensor = _Copy.apply(*pair, self.adds) if pair else CAST(x)
        return y

    def copy_of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The parameter that x is, perhaps in another shape, and x's copy; None of what is none."""
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(x.device.type):
            return None
        parameter = x if x._base is None else x._base
        weight = isinstance(parameter, nn.Parameter) and parameter.numel() == x.numel()
        if not weight or not x.is_contiguous():
            return None
        if parameter not in self.made:
            self.made[parameter] = CAST(parameter.detach())
        return parameter, self.made[parameter].view(x.shape)


class _Copy(torch.autograd.Function):
    """The copy as if it was made here: backward goes from the latest operation to the first, and
    gradients through one that was made in an earlier micro-batch would all come last, too late for
    their sums to travel meanwhile."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor, adds: bool) -> Tensor:
        ctx.parameter, ctx.adds = parameter, adds
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return gradient_of(ctx.parameter, gradient, ctx.adds), None, None


class _Linear(torch.autograd.Function):
    """F.linear of copies. Backward ends with a weight's gradient before it makes that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adds: bool, *pairs: Tensor) -> Tensor:
        """pairs: the weight and its copy, then, if there is a bias, the bias and its copy."""
        ctx.adds, ctx.parameters = adds, pairs[::2]
        ctx.save_for_backward(x, pairs[1])
        return CASTS.linear(x, *pairs[1::2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        rows, found = gradient.flatten(0, -2), list[Tensor | None]()
        products = (lambda: rows.T @ x.flatten(0, -2), lambda: rows.sum(0))
        for parameter, product in zip(ctx.parameters, products, strict=False):
            wanted = parameter.requires_grad  # and what is made in bf16 is gone before the next is
            found += [gradient_of(parameter, product(), ctx.adds) if wanted else None, None]
        of_x = (rows @ copy).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, *found


def gradient_of(parameter: Tensor, short: Tensor, adds: bool) -> Tensor | None:
    """What autograd is to add to a parameter's: a bf16 gradient in fp32; None if that is done.

    adds: done here, piece by piece, so that there is not all of it in fp32 beside the total.
    """
    if not adds or parameter.grad is None:
        return short.reshape(parameter.shape).to(parameter.dtype)
    parts = (x.split(NUMBERS_AT_ONCE) for x in (parameter.grad.view(-1), short.reshape(-1)))
    for total, part in zip(*parts, strict=True):
        total.add_(part)
    return None


CASTS = _Casts()


@contextmanager
def weights_cast_once(adds: bool = False) -> Iterator[None]:
    """All micro-batches between two updates go inside, under autocast or not; the same numbers.

    adds: to .grad itself, piece by piece; hooks do not hear of a later micro-batch's gradient then.
    """
    CASTS.linear, CASTS.adds = F.linear, adds  # the kernel is another one's, perhaps
    try:
        with replaced(CASTS.functions):
            yield
    finally:
        CASTS.made.clear()
