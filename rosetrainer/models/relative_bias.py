"""Positions as distances: a learned bias of the scores, for each head.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (Raffel et al.).
Shape letters: T sequence, H heads; tp = tp.size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.sharding import Cut, ShardSpec, new_parameter


class RelativeBias(nn.Module):
    """A learned bias for each head and each distance, which shares a bucket with like ones.

    (T) I -> (1, H/tp, T, T) V.

    The table (buckets, H) is cut by heads: (buckets, H/tp) on a rank. Its layers are all of one
    side, and so its gradient is whole.
    """

    def __init__(self, config: GPTConfig, is_causal: bool, tp: Axis) -> None:
        super().__init__()
        self.buckets, self.is_causal = config.relative_buckets, is_causal
        self.farthest = config.relative_distance
        shape = (self.buckets, config.n_heads)
        self.weight = new_parameter(ShardSpec(shape, (Cut(tp, 1),), init_std=0.02))

    def forward(self, T: int) -> Tensor:
        """(1, H/tp, T, T)"""
        places = torch.arange(T, device=self.weight.device)
        buckets = self.bucket_of(places[None, :] - places[:, None])  # of key minus query
        return F.embedding(buckets, self.weight).permute(2, 0, 1)[None]

    def bucket_of(self, distance: Tensor) -> Tensor:
        """Half of the buckets have one distance each, the others grow by a factor up to `farthest`,
        which the last one begins with. A causal side has all for what lies behind; else what lies
        ahead has a half of its own."""
        count, ahead = self.buckets, torch.zeros_like(distance)
        if self.is_causal:
            distance = (-distance).clamp(min=0)
        else:
            count //= 2
            ahead, distance = (distance > 0) * count, distance.abs()
        exact = count // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.farthest / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return ahead + torch.where(distance < exact, distance, far)
