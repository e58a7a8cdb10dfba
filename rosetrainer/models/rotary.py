"""Another GPT than GPT-2: rotary positions, norms without weights, squared ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rosetrainer.models.gpt import TransformerBlock
from rosetrainer.models.layers import (
    GPTWithoutPositionTable,
    PlainNorm,
    RotaryAttention,
    SquaredReLUFeedForward,
)
from rosetrainer.models.positions import rotary_angles


class RotaryBlock(TransformerBlock):
    norm_class = PlainNorm
    attention_class = RotaryAttention
    feed_forward_class = SquaredReLUFeedForward


class RotaryGPT(GPTWithoutPositionTable):
    """A decoder-only transformer of rotary blocks. Its output head, not tied, begins at zero."""

    block_class = RotaryBlock
    embedding_std = 0.5  # the norm that follows makes it one; smaller ones learn more slowly
    head_std = 0.0

    def attention_inputs(self, positions: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        return rotary_angles(positions, self.config, next(self.parameters()).dtype), mask
