"""A step of `python -m rosetrainer train`, out of the same pieces, on tokens that need no file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.work import Work
from rosetrainer.config import OptimConfig, TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.hardware.block_compile import compile_blocks, compiles
from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.models.build import build_model
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.parallel.zero.groups import shard_model
from rosetrainer.training.trainer import train_step


class SameBatch(Corpus):
    """The work's batch, in every step."""

    def __init__(self, work: Work) -> None:
        self._batch = [tensor.numpy() for tensor in work.batch()]

    def train_batch(self, seed: int, step: int, global_batch_size: int, rows: range) -> Any:
        inputs, labels = (array[rows.start : rows.stop] for array in self._batch)
        return inputs, labels


class OurStep:
    """What `train` sets up, and its train_step."""

    def __init__(
        self,
        work: Work,
        dtype: torch.dtype,
        context: ParallelContext | None = None,
        micro_batches: int = 1,
    ) -> None:
        self.context = context or ParallelContext()
        batch = OptimConfig(
            global_batch_size=work.batch_size, micro_batch_size=work.batch_size // micro_batches
        )
        self.config = TrainConfig(work.model, self.context.parallel, batch)
        self.corpus = SameBatch(work)
        self.model = build_model(work.model, self.context)
        if dtype == torch.float64:
            self.model.double()
        shard_model(self.model, self.context, products=dtype)
        self.optimizer = build_optimizer(self.model, self.config.optim)
        init_weights(self.model, self.config.run.seed)
        if compiles(self.config, self.context.tp.size, self.context.device)[0]:
            compile_blocks(self.model.blocks)
        self.autocast = autocast_for(dtype, self.context.device)
        self.kernels = partial(fast_kernels, dtype, self.context.device)
        self.steps = 0

    def __call__(self) -> tuple[float, float]:
        with self.kernels():
            figures = train_step(
                self.config,
                self.corpus,
                self.model,
                self.optimizer,
                self.context,
                self.autocast,
                self.steps,
            )
        self.steps += 1
        return figures["train/loss"], figures["train/grad_norm"]
