"""Another GPT than GPT-2: rotary positions, norms without weights, squared ReLU.

Shape letters: B batch, T sequence, D d_model, F d_ff, V vocabulary, H heads, K width of a head;
tp = tp.size. The cut layers, and so the communication, are those of model.py.

Each choice is a published one: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su
et al.); squared ReLU from "Primer: Searching for Efficient Transformers for Language Modeling" (So
et al.); output projections that begin at zero from "Fixup Initialization: Residual Learning Without
Normalization" (Zhang et al.).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.hardware.attention_blocks import prefers_fp32
from rosetrainer.models.attention import attend, causal_padding_mask, positions_of
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.comm import first_token
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import Dropout, Seed, name_sites
from rosetrainer.parallel.recompute import recompute
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding

EMBEDDING_STD = 0.5  # the norm that follows makes it one; smaller ones learn more slowly


def build_model(config: GPTConfig, context: ParallelContext | None = None) -> GPTModel:
    """The model of config.architecture, its weights empty. Raises ConfigError as GPTModel does."""
    return (RotaryGPT if config.architecture == "rotary" else GPTModel)(config, context)


def plain_norm(x: Tensor) -> Tensor:
    """(.., D): mean 0 and variance 1 over D, without weights: the layer that follows has them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def turns_of(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """(.., T) positions -> (.., T, 3, 1, K/2) complex: by how much queries and keys are turned.

    Pair i of a head turns by position x base^(-2i/K); the third part, of values, does not turn.
    """
    K = config.head_width
    pairs = torch.arange(0, K, 2, dtype=torch.float64, device=positions.device)
    speeds = config.rotary_base ** (-pairs / K)  # (K/2,)
    whose = torch.tensor([1.0, 1.0, 0.0], device=positions.device)
    angles = positions[..., None, None, None] * whose[:, None, None] * speeds
    turns = torch.polar(torch.ones_like(angles), angles)
    return turns if dtype == torch.float64 else turns.to(torch.complex64)


def turn(fused: Tensor, turns: Tensor) -> Tensor:
    """(B, T, 3, H/tp, K) -> that shape, in fp32 or better: neighbours 2i and 2i+1 turned as one
    complex number.

    A query and a key then meet under an angle that tells how far apart they stand.
    """
    wide = fused.to(torch.promote_types(fused.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (B, T, 3, H/tp, K/2)
    return torch.view_as_real(pairs * turns).flatten(-2)


class RotaryAttention(nn.Module):
    """Causal self-attention with rotary positions, heads split over tp. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: GPTConfig, tp: Axis, recompute: bool = False) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.head_width = config.head_width
        self.query_key_value = ColumnParallelLinear(
            config.d_model, 3 * width, config.bias, stride=3, tp=tp
        )
        self.tp, self.recompute = tp, recompute
        self.dropout = Dropout(config.dropout)
        self.dense = RowParallelLinear(width, config.d_model, config.bias, tp=tp, init_std=0.0)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None, seed: Seed) -> Tensor:
        fused = self.query_key_value(x).unflatten(-1, (3, -1, self.head_width))
        turned = turn(fused, turns)
        if not prefers_fp32(turned):
            turned = turned.to(fused.dtype)
        query, key, value = (part.transpose(1, 2) for part in turned.unbind(2))  # (B, H/tp, T, K)
        inputs = (query, key, value, mask, self.dropout, seed, self.tp)
        with torch.autocast(x.device.type, enabled=False):
            heads = recompute(attend, *inputs, enabled=self.recompute, tp=self.tp)
        return self.dense(heads.transpose(1, 2).flatten(2))  # (B, T, H/tp*K) -> (B, T, D)


class SquaredReLUFeedForward(nn.Module):
    """Column, the square of what is positive, row. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        width = config.ff_width
        self.dense_h_to_4h = ColumnParallelLinear(config.d_model, width, config.bias, tp=tp)
        self.dense_4h_to_h = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=0.0
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = _SquaredReLU.apply(self.dense_h_to_4h(x))  # (B, T, F/tp)
        return self.dense_4h_to_h(hidden)  # (B, T, D)


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


class RotaryBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream.

    The stream is (B, T, D), the same on every rank, or under sequence parallelism (B, T/tp, D).
    """

    def __init__(self, config: GPTConfig, tp: Axis, recompute: str = "none") -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.attention = RotaryAttention(config, tp, recompute == "attention")
        self.attention_dropout = Dropout(config.dropout)
        self.feed_forward = SquaredReLUFeedForward(config, tp)
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None, seed: Seed) -> Tensor:
        again = self.recompute == "block"
        return recompute(self.layers, x, turns, mask, seed, enabled=again, tp=self.tp)

    def layers(self, x: Tensor, turns: Tensor, mask: Tensor | None, seed: Seed) -> Tensor:
        first = (first_token(x, self.tp),)
        attended = self.attention(plain_norm(x), turns, mask, seed)
        x = x + self.attention_dropout(attended, seed, first)
        fed = self.feed_forward(plain_norm(x))
        return x + self.feed_forward_dropout(fed, seed, first)


class RotaryGPT(GPTModel):
    """A decoder-only transformer of rotary blocks. Its output head, not tied, begins at zero.

    Raises ConfigError as GPTModel does.
    """

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        nn.Module.__init__(self)  # the parts below take the place of GPT-2's
        context = context or ParallelContext()
        config.check(context.tp.size, context.tp.sequence_parallel)
        self.config, self.tp = config, context.tp
        shape = (config.vocab_size, config.d_model)
        with context.device:
            self.token_embedding = VocabParallelEmbedding(
                *shape, tp=context.tp, init_std=EMBEDDING_STD
            )
            self.embedding_dropout = Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                RotaryBlock(config, context.tp, context.recompute) for _ in range(config.n_layers)
            )
            self.output_head = VocabParallelEmbedding(*shape, tp=context.tp, init_std=0.0)
        name_sites(self)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, seed: Seed = None
    ) -> Tensor:
        """What the output head reads. (B, T) -> (B, T, D), or (B, T/tp, D)"""
        T = input_ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        positions = positions_of(input_ids, attention_mask)
        turns = turns_of(positions, self.config, self.token_embedding.weight.dtype)
        mask = None if attention_mask is None else causal_padding_mask(attention_mask)
        x = self.token_embedding(input_ids)
        x = self.embedding_dropout(x, seed, (first_token(x, self.tp),))
        for block in self.blocks:
            x = block(x, turns, mask, seed)
        return plain_norm(x)
