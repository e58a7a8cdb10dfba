"""The dense oracle of RotaryGPT in plain modules, pair by pair and head by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import (
    ReferenceAttention,
    ReferenceBlock,
    ReferenceFeedForward,
    ReferenceGPT,
)


class Standardized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(.., D): mean 0, variance 1."""
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class ReferenceRotaryAttention(ReferenceAttention):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.base = config.rotary_base

    def positioned(self, head: Tensor) -> Tensor:
        """(1, T, K): features 2i and 2i+1 at position t, rotated by the angle t x base^(-2i/K)."""
        positions = torch.arange(head.shape[1], dtype=head.dtype, device=head.device)
        columns: list[Tensor] = []
        for i in range(0, self.head_width, 2):
            angle = positions * self.base ** (-i / self.head_width)
            a, b = head[..., i], head[..., i + 1]
            columns += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return torch.stack(columns, -1)


class ReferenceSquaredReLU(ReferenceFeedForward):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense_h_to_4h(x)
        return self.dense_4h_to_h(hidden * hidden * (hidden > 0))


class ReferenceRotaryBlock(ReferenceBlock):
    attention_class, feed_forward_class = ReferenceRotaryAttention, ReferenceSquaredReLU

    @staticmethod
    def norm(config: GPTConfig) -> nn.Module:
        return Standardized()


class ReferenceRotaryGPT(ReferenceGPT):
    """What RotaryGPT must compute in every layout."""

    block_class, has_position_table = ReferenceRotaryBlock, False
