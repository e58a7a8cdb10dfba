"""Parts that another GPT than GPT-2 takes.

Shape letters: B batch, T sequence, D d_model, F d_ff, H heads, K width of a head; tp = tp.size.
The cut layers, and so the communication, are those of gpt.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import IGNORED, GPTConfig
from rosetrainer.models.gpt import FeedForward, GPTModel, MultiHeadSelfAttention
from rosetrainer.models.positions import apply_rotary
from rosetrainer.parallel.comm import gather_from_tensor_parallel_region
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.dropout import Seed
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding


class GPTWithoutPositionTable(GPTModel):
    """A GPT whose attention layers know where tokens stand, and whose stream does not."""

    positions_class = nn.Identity

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.token_embedding(ids)


class PlainNorm(nn.Module):
    """(.., D): mean 0 and variance 1 over D, without weights: the layer that follows has them."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def zero_std(fan_in: int, config: GPTConfig) -> float:
    """Output projections that begin at zero: "Fixup Initialization" (Zhang et al.)."""
    return 0.0


class RotaryAttention(MultiHeadSelfAttention):
    """Causal self-attention with rotary positions, heads split over tp. (B, T, D) -> (B, T, D)"""

    output_std = staticmethod(zero_std)

    def forward(  # type: ignore[override]
        self, x: Tensor, angles: Tensor, mask: Tensor | None = None, seed: Seed = None
    ) -> Tensor:
        fused = self.query_key_value(x).unflatten(-1, (3, -1, self.head_width))
        turned = apply_rotary(fused, angles).to(fused.dtype)  # (B, T, 3, H/tp, K)
        with torch.autocast(x.device.type, enabled=False):
            heads = self.heads(turned, mask, seed)
        return self.dense(heads)  # (B, T, H/tp*K) -> (B, T, D)


class SquaredReLUFeedForward(FeedForward):
    """Column, the square of what is positive, row. (B, T, D) -> (B, T, D)

    "Primer: Searching for Efficient Transformers for Language Modeling" (So et al.).
    """

    output_std = staticmethod(zero_std)

    def activation(self, x: Tensor) -> Tensor:
        return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    """Keeps one tensor and passes over it four times; relu, then square, would keep two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class HasHead(Protocol):
    """A model that ends as a GPT does."""

    config: GPTConfig
    tp: Axis
    output_head: VocabParallelEmbedding


def read_out(
    model: HasHead,
    x: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None = None,
    return_logits: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(logits, loss) as GPTModel.forward's, of what the output head reads, (B, T, D).

    labels: (B, T), of each place itself; ignored where attention_mask is 0.
    """
    logits = loss = None
    if labels is not None:
        if attention_mask is not None:
            labels = labels.masked_fill(~attention_mask.bool(), IGNORED)
        loss, _ = model.output_head.loss(x, labels)
    if labels is None or return_logits:
        local = model.output_head.logits(x)  # (B, T, V/tp)
        logits = gather_from_tensor_parallel_region(local, model.tp)  # (B, T, V)    all-gather
        logits = logits[..., : model.config.vocab_size]  # without the pad
    return logits, loss
