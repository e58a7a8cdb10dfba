"""Numbers that are not finite: a bad gradient costs one step, a bad loss ends the run."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from rosetrainer.config import TrainConfig
from rosetrainer.parallel.comm import all_reduce
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import whole_specs
from rosetrainer.validation import ConfigError


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds nan or inf. Raised on every rank, with the first rank that has one."""


def check_gradients(model: nn.Module, context: ParallelContext) -> None:
    """Raises NonFiniteGradientError on all ranks if a gradient of any rank is not finite.

    Before gradients are summed: then every rank would have it, and none could be named.
    """
    names, gradients = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            names.append(name)
            gradients.append(parameter.grad)
    norms = torch._foreach_norm(gradients)
    suspects = (~torch.stack([norm.float() for norm in norms]).isfinite()).nonzero()
    # A sum of squares is nan or inf if a number is, but finite numbers too can overflow it.
    bad = [index for index in suspects.flatten().tolist() if not gradients[index].isfinite().all()]
    every = list(whole_specs(model))  # those of other stages too: all ranks number them alike
    nobody = context.world_size * len(every)
    found = context.rank * len(every) + every.index(names[bad[0]]) if bad else nobody
    first = torch.tensor(found, device=context.device)
    for axis in context.axes:
        first = all_reduce(first, axis, "optimizer", dist.ReduceOp.MIN)
    if first < nobody:
        rank, index = divmod(int(first), len(every))
        raise NonFiniteGradientError(f"rank {rank} has nan or inf in a gradient: {every[index]}")


def check_finite(what: str, value: float, step: int, config: TrainConfig) -> None:
    """Raises ConfigError, before anything is saved, if training has diverged."""
    if not math.isfinite(value):
        raise ConfigError(
            f"the {what} is {value} at step {step + 1}; try a learning_rate below "
            f"{config.optim.learning_rate:g} and a new --out; what was saved before is kept"
        )


def check_norm(norm: float, dtype: torch.dtype, config: TrainConfig) -> None:
    """Raises NonFiniteGradientError if an update by gradients of this norm would hold inf or nan.

    Squares of what is not clipped can be infinite in AdamW's moments though the gradient is not.
    """
    if not math.isfinite(norm):
        raise NonFiniteGradientError(f"the gradients' norm is {norm}")
    limit = math.sqrt(torch.finfo(dtype).max)
    if not config.optim.grad_clip and norm > limit:
        raise NonFiniteGradientError(
            f"the gradients' norm is {norm:.3g}, and squares of numbers above {limit:.1e} overflow "
            f"{str(dtype).removeprefix('torch.')}; a grad_clip above 0 bounds it"
        )


def check_skipped(
    skipped: int, error: NonFiniteGradientError, step: int, config: TrainConfig
) -> None:
    """Raises ConfigError if more steps were skipped than config.monitor.max_skipped."""
    most = config.monitor.max_skipped
    if skipped > most:
        raise ConfigError(
            f"step {step + 1}: {error}; skipped {skipped}, max_skipped={most}; "
            f"try a learning_rate below {config.optim.learning_rate:g} and a new --out; what was "
            f"saved before is kept"
        )
