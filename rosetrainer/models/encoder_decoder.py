"""The encoder-decoder of "Attention Is All You Need", tensor-parallel, with GPT-2's blocks.

Shape letters: B batch, S source, T target, D d_model, V vocabulary, H heads, K width of a head;
tp = tp.size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.models.attention import attend, causal_padding_mask, positions_of
from rosetrainer.models.gpt import (
    LayerNorm,
    PositionEmbedding,
    TransformerBlock,
    residual_std,
    token_table,
)
from rosetrainer.models.layers import read_out
from rosetrainer.parallel.comm import first_token, own_tokens
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.dropout import Dropout, Seed, name_sites
from rosetrainer.parallel.recompute import recompute
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class MultiHeadCrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another. (B, T, D), (B, S, D) -> (B, T, D)

    Heads are split over tp as in self-attention, but query and key-value are layers of their own,
    each with an `f`: one sum over tp forward, two backward, for both sequences get a gradient.
    Under sequence parallelism (B, T/tp, D), (B, S/tp, D) -> (B, T/tp, D).
    """

    def __init__(self, config: GPTConfig, tp: Axis, recompute: bool = False) -> None:
        super().__init__()
        width = config.n_heads * config.head_width  # H*K
        self.tp, self.recompute = tp, recompute
        self.dropout = Dropout(config.dropout)
        self.head_width = config.head_width
        self.query = ColumnParallelLinear(config.d_model, width, config.bias, tp=tp)
        self.key_value = ColumnParallelLinear(
            config.d_model, 2 * width, config.bias, stride=2, tp=tp
        )
        self.dense = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=residual_std(width, config)
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, seed: Seed = None) -> Tensor:
        """mask: (B, 1, 1, S), true where a target token may look at a source token."""
        query = self.query(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        fused = self.key_value(memory)  # (B, S, 2*H/tp*K)
        fused = fused.unflatten(-1, (2, -1, self.head_width))  # (B, S, 2, H/tp, K)
        key, value = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, S, K)
        inputs = (query, key, value, mask, self.dropout, seed, self.tp)
        heads = recompute(attend, *inputs, enabled=self.recompute, tp=self.tp)
        return self.dense(heads.transpose(1, 2).flatten(2))  # (B, T, H/tp*K) -> (B, T, D)


class DecoderBlock(TransformerBlock):
    """Self-attention, cross-attention and feed-forward, each normed before and then added."""

    def __init__(self, config: GPTConfig, tp: Axis, recompute: str = "none") -> None:
        super().__init__(config, tp, recompute)
        self.cross_attention_norm = self.norm_class(config.d_model, config.bias, tp)
        self.cross_attention = MultiHeadCrossAttention(config, tp, recompute == "attention")
        self.cross_attention_dropout = Dropout(config.dropout)

    def layers(self, x: Tensor, seed: Seed, *inputs: Any) -> Tensor:
        """x: (B, T, D); memory: (B, S, D); under sequence parallelism T/tp and S/tp."""
        mask, memory, memory_mask = inputs
        first = (first_token(x, self.tp),)
        attended = self.attention(self.attention_norm(x), mask, seed)
        x = x + self.attention_dropout(attended, seed, first)
        looked = self.cross_attention(self.cross_attention_norm(x), memory, memory_mask, seed)
        x = x + self.cross_attention_dropout(looked, seed, first)
        fed = self.feed_forward(self.feed_forward_norm(x))
        return x + self.feed_forward_dropout(fed, seed, first)


class EncoderDecoderModel(nn.Module):
    """n_layers blocks that read a source, and n_layers that write a target while they look at it.

    One token embedding for both sides and, if tied, for the output head. context_length bounds
    each side. Weights are empty until init_weights or load_whole fills them.
    Raises ConfigError if context.tp cannot share the heads, the feed-forward layer or the tokens.
    """

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        context = context or ParallelContext()
        config.check(context.tp.size, context.tp.sequence_parallel)
        self.config, self.tp = config, context.tp
        layers, tp, mode = range(config.n_layers), context.tp, context.recompute
        table = (config.context_length, config.d_model, tp)
        with context.device:
            self.token_embedding = token_table(config, tp)
            self.source_positions = PositionEmbedding(*table)
            self.target_positions = PositionEmbedding(*table)
            self.source_dropout = Dropout(config.dropout)
            self.target_dropout = Dropout(config.dropout)
            self.encoder = nn.ModuleList(TransformerBlock(config, tp, mode) for _ in layers)
            self.encoder_norm = LayerNorm(config.d_model, config.bias, tp)
            self.decoder = nn.ModuleList(DecoderBlock(config, tp, mode) for _ in layers)
            self.final_norm = LayerNorm(config.d_model, config.bias, tp)
            self.output_head = self.token_embedding if config.tied else token_table(config, tp)
        name_sites(self)

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        source_mask: Tensor,
        target_mask: Tensor,
        labels: Tensor | None = None,
        return_logits: bool = True,
        seed: Seed = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss); logits are None with labels and return_logits=False.

        source_ids, source_mask: (B, S). target_ids, target_mask, labels: (B, T). logits: (B, T, V).
        Masks are 1 for a token and 0 for padding on either side, which moves nothing. A label is
        the token that should FOLLOW, also after the last one; -100 and padding are ignored.
        seed: for dropout, in training; without it nothing is dropped.
        Raises ValueError if S or T exceeds context_length, for a source without a token or an id
        outside the vocabulary, and under sequence parallelism if tp does not divide S or T.
        """
        memory = self.encode(source_ids, source_mask, seed)
        x = self.embed(target_ids, target_mask, self.target_positions)
        x = self.target_dropout(x, seed, (first_token(x, self.tp),))
        causal, real = causal_padding_mask(target_mask), source_mask.bool()[:, None, None, :]
        for block in self.decoder:
            x = block(x, causal, memory, real, seed=seed)
        return read_out(self, self.final_norm(x), labels, target_mask, return_logits)

    def encode(self, source_ids: Tensor, source_mask: Tensor, seed: Seed = None) -> Tensor:
        """The source as the decoder looks at it. (B, S) -> (B, S, D), or (B, S/tp, D)"""
        if not source_mask.any(dim=1).all():
            raise ValueError("a source holds no token, so there is nothing to look at")
        x = self.embed(source_ids, source_mask, self.source_positions)
        x = self.source_dropout(x, seed, (first_token(x, self.tp),))
        mask = source_mask.bool()[:, None, None, :]  # (B, 1, 1, S): not causal
        for block in self.encoder:
            x = block(x, mask, seed=seed)
        return self.encoder_norm(x)

    def embed(self, ids: Tensor, attention_mask: Tensor, positions: PositionEmbedding) -> Tensor:
        """(B, T) -> (B, T, D), or (B, T/tp, D) under sequence parallelism"""
        T = ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        places = own_tokens(positions_of(ids, attention_mask), self.tp)
        return self.token_embedding(ids) + positions(places)
