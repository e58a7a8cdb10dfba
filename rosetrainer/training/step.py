"""One update of the model, and what stops a run that has gone wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.optimizer import set_learning_rates
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.data_parallel import accumulate_gradients
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.precision import Autocast, NonFiniteGradientError
from rosetrainer.validation import ConfigError


def train_step(
    config: TrainConfig,
    corpus: Corpus,
    model: nn.Module,
    optimizer: AdamW,
    context: ParallelContext,
    autocast: Autocast,
    step: int,
) -> dict[str, float]:
    """One update; its figures by TensorBoard tag. Raises ConfigError if the loss is not finite.

    Raises NonFiniteGradientError, on every rank and before anything is updated, if a gradient or
    the norm of all is not, or is too large for the optimizer.
    """
    rate = set_learning_rates(optimizer, config.optim, step, config.run.steps)
    batches = micro_batches(config, corpus, context, step)
    seed = DropoutSeed(config.run.seed, step)
    loss = accumulate_gradients(model, batches, context, autocast, seed)
    check_finite("loss", loss, step, config)
    norm = clip_gradients(model, context.tp, config.optim.grad_clip)
    check_norm(norm, next(model.parameters()).dtype, config)
    optimizer.step()
    optimizer.zero_grad()
    return {"train/loss": loss, "train/lr": rate, "train/grad_norm": norm}


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


def micro_batches(
    config: TrainConfig, corpus: Corpus, context: ParallelContext, step: int
) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the step's global batch: by dp rank alone, so a tp group shares it."""
    optim, dp = config.optim, context.dp
    size = optim.micro_batch(dp.size)
    batches = []
    for index in range(optim.accumulation(dp.size)):
        first = (index * dp.size + dp.rank) * size
        rows = range(first, first + size)
        arrays = corpus.train_batch(config.run.seed, step, optim.global_batch_size, rows)
        input_ids, labels = (torch.from_numpy(a).to(context.device) for a in arrays)
        batches.append((input_ids, labels))
    return batches
