"""What training holds for each of a model's numbers, before there is a model."""

from __future__ import annotations

import torch

from rosetrainer.config import TrainConfig
from rosetrainer.models.build import build_model
from rosetrainer.optim.frozen import freeze
from rosetrainer.parallel.context import ParallelContext


def frozen_share(config: TrainConfig) -> float:
    """Of the model's numbers those that are not trained. Raises ConfigError as `freeze` does."""
    if config.optim.freeze is None:
        return 0.0
    shapes_only = build_model(config.model, ParallelContext(device=torch.device("meta")))
    frozen = freeze(shapes_only, config.optim.freeze)
    return frozen / sum(p.numel() for p in shapes_only.parameters())


def bytes_of_a_number(config: TrainConfig, dp_size: int, frozen: float) -> float:
    """On a rank on average: its weight, gradient and moments. frozen: of frozen_share."""
    numbers = 3 if config.optim.optimizer == "muon" else 4
    level = config.parallel.zero
    on_all = (numbers, 2, 1, 0)[level]
    shards = dp_size // config.parallel.dp_replicas if level else 1
    trained = on_all + (numbers - on_all) / shards
    weight = 1 / shards if level == 3 else 1  # all that a frozen one has
    each = trained + frozen * (weight - trained)
    return each * (8 if config.precision.dtype == "float64" else 4)
