"""The encoder-decoder of "Attention Is All You Need", tensor-parallel, with GPT-2's blocks.

Shape letters: B batch, S source, T target, D d_model, V vocabulary, H heads, K width of a head;
tp = tp.size.
"""

from __future__ import annotations

import torch.nn.functional as F
from config import IGNORED, GPTConfig
from model import (
    Embedding,
    FeedForward,
    LayerNorm,
    MultiHeadSelfAttention,
    TransformerBlock,
    causal_padding_mask,
    mean_loss,
    positions_of,
    residual_std,
)
from parallel_context import Axis, ParallelContext
from tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


class MultiHeadCrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another. (B, T, D), (B, S, D) -> (B, T, D)

    Heads are split over tp as in self-attention, but query and key-value are layers of their own,
    each with an `f`: one all-reduce forward, two backward, for both sequences get a gradient.
    """

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        width = config.n_heads * config.head_width  # H*K
        self.head_width = config.head_width
        self.query = ColumnParallelLinear(config.d_model, width, config.bias, tp=tp)
        self.key_value = ColumnParallelLinear(
            config.d_model, 2 * width, config.bias, stride=2, tp=tp
        )
        self.dense = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=residual_std(width, config)
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """mask: (B, 1, 1, S), true where a target token may look at a source token."""
        query = self.query(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        fused = self.key_value(memory)  # (B, S, 2*H/tp*K)
        fused = fused.unflatten(-1, (2, -1, self.head_width))  # (B, S, 2, H/tp, K)
        key, value = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, S, K)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(heads.transpose(1, 2).flatten(2))  # (B, T, H/tp*K) -> (B, T, D)


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normed before and then added."""

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.d_model, config.bias)
        self.attention = MultiHeadSelfAttention(config, tp)
        self.cross_attention_norm = LayerNorm(config.d_model, config.bias)
        self.cross_attention = MultiHeadCrossAttention(config, tp)
        self.feed_forward_norm = LayerNorm(config.d_model, config.bias)
        self.feed_forward = FeedForward(config, tp)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        x = x + self.cross_attention(self.cross_attention_norm(x), memory, memory_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class EncoderDecoderModel(nn.Module):
    """n_layers blocks that read a source, and n_layers that write a target while they look at it.

    One token embedding for both sides and, if tied, for the output head. context_length bounds
    each side. Weights are empty until init_weights or load_whole fills them.
    Raises ConfigError if context.tp cannot share the heads or the feed-forward layer.
    """

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        context = context or ParallelContext()
        config.check(context.tp.size)
        self.config = config
        layers, tp, bias = range(config.n_layers), context.tp, config.bias
        with context.device:
            self.token_embedding = Embedding(config.vocab_size, config.d_model, decay=True)
            self.source_positions = Embedding(config.context_length, config.d_model, decay=False)
            self.target_positions = Embedding(config.context_length, config.d_model, decay=False)
            self.encoder = nn.ModuleList(TransformerBlock(config, tp) for _ in layers)
            self.encoder_norm = LayerNorm(config.d_model, bias)
            self.decoder = nn.ModuleList(DecoderBlock(config, tp) for _ in layers)
            self.final_norm = LayerNorm(config.d_model, bias)
            self.output_head = (
                self.token_embedding
                if config.tied
                else Embedding(config.vocab_size, config.d_model, decay=True)
            )

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        source_mask: Tensor,
        target_mask: Tensor,
        labels: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss); logits are None with labels and return_logits=False.

        source_ids, source_mask: (B, S). target_ids, target_mask, labels: (B, T). logits: (B, T, V).
        Masks are 1 for a token and 0 for padding on either side, which moves nothing. A label is
        the token that should FOLLOW, also after the last one; -100 and padding are ignored.
        Raises ValueError if S or T exceeds context_length, or a source holds no token.
        """
        memory = self.encode(source_ids, source_mask)
        x = self.embed(target_ids, target_mask, self.target_positions)
        causal = causal_padding_mask(target_mask)
        for block in self.decoder:
            x = block(x, causal, memory, source_mask.bool()[:, None, None, :])
        logits = F.linear(self.final_norm(x), self.output_head.weight)  # (B, T, V)
        if labels is None:
            return logits, None
        loss = mean_loss(logits, labels.masked_fill(~target_mask.bool(), IGNORED))
        return (logits if return_logits else None), loss

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> Tensor:
        """The source as the decoder looks at it. (B, S) -> (B, S, D)"""
        if not source_mask.any(dim=1).all():
            raise ValueError("a source holds no token, so there is nothing to look at")
        x = self.embed(source_ids, source_mask, self.source_positions)
        mask = source_mask.bool()[:, None, None, :]  # (B, 1, 1, S): not causal
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def embed(self, ids: Tensor, attention_mask: Tensor, positions: Embedding) -> Tensor:
        """(B, T) -> (B, T, D)"""
        T = ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        return self.token_embedding(ids) + positions(positions_of(ids, attention_mask))
