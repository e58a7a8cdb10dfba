"""Shard specs for the parameters of a module that are not cut: every rank holds them whole.

Layers of ours bring their specs along. A model that is only in part made of them has others, an
nn.LayerNorm's or an nn.Linear's, which the clip, the optimizer and checkpoints ask as well.
"""

from __future__ import annotations

from torch import nn

from rosetrainer.parallel.sharding import ShardSpec


def mark_replicated(module: nn.Module) -> None:
    """Gives every parameter without a shard spec that of a whole one, the same on each rank.

    It decays if it has more than one dimension, as weights do, and biases and norms do not.
    Its gradient has to be whole on each rank (I): what feeds a cut layer goes through `f`, which
    ColumnParallelLinear has in it.
    """
    for parameter in module.parameters():
        if not hasattr(parameter, "shard_spec"):
            whole = ShardSpec(tuple(parameter.shape), decay=parameter.ndim > 1)
            parameter.shard_spec = whole  # type: ignore[attr-defined]
