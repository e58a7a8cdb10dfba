"""AdamW or Muon with decay by the shard spec, and their schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rosetrainer.config import OptimConfig
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.muon import Muon, hidden_layers
from rosetrainer.parallel.sharding import shard_spec


def whole_matrices(model: nn.Module, config: OptimConfig) -> list[nn.Parameter]:
    """Whose update needs the whole matrix: those that Muon takes, if it is used."""
    weights = [layer.weight for layer in hidden_layers(model) if config.optimizer == "muon"]
    return [weight for weight in weights if weight.requires_grad]


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """What config.optimizer names, over the model's parameters that are trained."""
    muon = whole_matrices(model, config)
    own_rate = config.head_learning_rate is not None
    head = list(model.get_submodule("output_head").parameters()) if own_rate else []
    head = [weight for weight in head if weight.requires_grad]
    taken = {id(weight) for weight in (*muon, *head)}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    decayed = [p for p in parameters if shard_spec(p).decay]
    others = [p for p in parameters if not shard_spec(p).decay]
    decay, rate = {"weight_decay": config.weight_decay}, {"peak": config.learning_rate}
    groups: list[dict[str, Any]] = [
        {"params": decayed, **decay, **rate},
        {"params": others, "weight_decay": 0.0, **rate},
        {"params": head, **decay, "peak": config.head_learning_rate},
        {
            "params": muon,
            **decay,
            "peak": config.muon_learning_rate,
            "momentum": config.muon_momentum,
        },
    ]
    used = [{**group, "lr": group["peak"]} for group in groups if group["params"]]
    adamw: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    return (Muon if muon else AdamW)(used, **adamw)


def set_learning_rates(optimizer: AdamW, config: OptimConfig, step: int, steps: int) -> float:
    """Sets each group's for the step, which is counted from 0; gives AdamW's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, steps, group["peak"])
    return learning_rate(config, step, steps)


def learning_rate(config: OptimConfig, step: int, steps: int, peak: float | None = None) -> float:
    """Linear warm-up to the peak, stable_ratio of the rest there, then a cosine or a line down to
    min_lr_ratio of it.

    step counts from 0; peak is AdamW's unless given.
    The last step of a line is the last before it ends: a step of size zero would be no step.
    """
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    falls = config.warmup_steps + config.stable_ratio * max(steps - config.warmup_steps, 0)
    after = max(step - falls, 0)
    if config.schedule == "linear":
        left = 1 - after / max(steps - falls, 1)
    else:
        progress = after / max(steps - 1 - falls, 1)
        left = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
