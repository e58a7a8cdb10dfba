"""The GPT of "Language Models are Unsupervised Multitask Learners" (GPT-2), tensor-parallel.

Shape letters: B batch, T sequence, D d_model, F d_ff, V vocabulary, H heads, K width of a head;
tp = tp.size. One model serves every layout: at tp 1 the layers communicate nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from attention import attend, causal_padding_mask, positions_of
from comm import first_token, gather_from_tensor_parallel_region, own_tokens
from config import IGNORED, GPTConfig
from dropout import Dropout, Seed, name_sites
from parallel_context import Axis, ParallelContext
from recompute import recompute
from sharding import replicated_parameter
from tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from vocab_parallel import VocabParallelEmbedding

EMBEDDING_STD = 0.02


def residual_std(fan_in: int, config: GPTConfig) -> float:
    """For what is added to the residual stream, 2 x n_layers times: GPT-2 scales it down."""
    return 1 / math.sqrt(fan_in * 2 * config.n_layers)


class LayerNorm(nn.Module):
    """Layer norm over D, the same on every rank."""

    def __init__(self, d_model: int, bias: bool, tp: Axis) -> None:
        super().__init__()
        self.weight = replicated_parameter((d_model,), tp, init_mean=1.0)
        self.bias = replicated_parameter((d_model,), tp) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class PositionEmbedding(nn.Module):
    """(..) positions -> (.., D): a table (n, D), the same on every rank."""

    def __init__(self, n: int, d_model: int, tp: Axis) -> None:
        super().__init__()
        self.weight = replicated_parameter((n, d_model), tp, init_std=EMBEDDING_STD)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention, heads split over tp. (B, T, D) -> (B, T, D)

    A rank computes H/tp heads from first to last: one sum over tp forward (after `dense`), one
    backward (before `query_key_value`). Under sequence parallelism (B, T/tp, D) in and out.
    """

    output_std = staticmethod(residual_std)

    def __init__(self, config: GPTConfig, tp: Axis, recompute: bool = False) -> None:
        super().__init__()
        width = config.n_heads * config.head_width  # H*K, which need not be D
        self.head_width = config.head_width
        self.query_key_value = ColumnParallelLinear(
            config.d_model, 3 * width, config.bias, stride=3, tp=tp
        )
        self.tp, self.recompute = tp, recompute
        self.dropout = Dropout(config.dropout)
        self.dense = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=self.output_std(width, config)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, seed: Seed = None) -> Tensor:
        """mask: (B, 1, T, T), true where a query may look at a key; causal unless given."""
        fused = self.query_key_value(x)  # (B, T, 3*H/tp*K)
        fused = fused.unflatten(-1, (3, -1, self.head_width))  # (B, T, 3, H/tp, K)
        return self.dense(self.heads(fused, mask, seed))  # (B, T, H/tp*K) -> (B, T, D)

    def heads(self, fused: Tensor, mask: Tensor | None, seed: Seed) -> Tensor:
        """Queries, keys and values (B, T, 3, H/tp, K) -> (B, T, H/tp*K)"""
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, T, K)
        inputs = (query, key, value, mask, self.dropout, seed, self.tp)
        heads = recompute(attend, *inputs, enabled=self.recompute, tp=self.tp)
        return heads.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Column then row, nothing gathered between. (B, T, D) -> (B, T, D)

    GELU acts on each feature alone, so a slice of the features can pass through it; a partial sum
    could not. One sum over tp forward, one backward.
    """

    output_std = staticmethod(residual_std)

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        width = config.ff_width
        self.dense_h_to_4h = ColumnParallelLinear(config.d_model, width, config.bias, tp=tp)
        self.dense_4h_to_h = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=self.output_std(width, config)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.dense_h_to_4h(x))  # (B, T, F/tp)
        return self.dense_4h_to_h(hidden)  # (B, T, D)

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream.

    The stream is (B, T, D), the same on every rank, or under sequence parallelism (B, T/tp, D), a
    rank's own tokens ("Reducing Activation Recomputation in Large Transformer Models", Korthikanti
    et al.). Another model names classes of its own, which are called as these are.
    """

    norm_class: type[Any] = LayerNorm
    attention_class: type[Any] = MultiHeadSelfAttention
    feed_forward_class: type[Any] = FeedForward

    def __init__(self, config: GPTConfig, tp: Axis, recompute: str = "none") -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.attention_norm = self.norm_class(config.d_model, config.bias, tp)
        self.attention = self.attention_class(config, tp, recompute == "attention")
        self.attention_dropout = Dropout(config.dropout)
        self.feed_forward_norm = self.norm_class(config.d_model, config.bias, tp)
        self.feed_forward = self.feed_forward_class(config, tp)
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *inputs: Any, seed: Seed = None) -> Tensor:
        """inputs: what the attention layer takes after x; GPT-2's takes a mask."""
        enabled = self.recompute == "block"
        return recompute(self.layers, x, seed, *inputs, enabled=enabled, tp=self.tp)

    def layers(self, x: Tensor, seed: Seed, *inputs: Any) -> Tensor:
        first = (first_token(x, self.tp),)
        attended = self.attention(self.attention_norm(x), *inputs, seed=seed)
        x = x + self.attention_dropout(attended, seed, first)
        fed = self.feed_forward(self.feed_forward_norm(x))
        return x + self.feed_forward_dropout(fed, seed, first)


class GPTModel(nn.Module):
    """A decoder-only transformer. Weights are empty until init_weights or load_whole fills them.

    Raises ConfigError if context.tp cannot share the heads, the feed-forward layer or the tokens.
    """

    block_class = TransformerBlock
    positions_class: type[Any] = PositionEmbedding
    embedding_std = head_std = EMBEDDING_STD

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        context = context or ParallelContext()
        config.check(context.tp.size, context.tp.sequence_parallel)
        self.config, self.tp = config, context.tp
        tp, length, layers = context.tp, config.context_length, range(config.n_layers)
        with context.device:
            self.token_embedding = token_table(config, tp, self.embedding_std)
            self.position_embedding = self.positions_class(length, config.d_model, tp)
            self.embedding_dropout = Dropout(config.dropout)
            blocks = (self.block_class(config, tp, context.recompute) for _ in layers)
            self.blocks = nn.ModuleList(blocks)
            self.final_norm = self.block_class.norm_class(config.d_model, config.bias, tp)
            # Tied, it is the same module under a second name, and its weight one parameter.
            self.output_head = (
                self.token_embedding if config.tied else token_table(config, tp, self.head_std)
            )
        name_sites(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
        seed: Seed = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss); logits are None with labels and return_logits=False.

        input_ids: (B, T). logits: (B, T, V).
        attention_mask: (B, T), 1 for a token, 0 for padding on either side; positions count the
        tokens only, so padding moves nothing. Logits at padding mean nothing.
        labels: (B, T), the token that should FOLLOW each input, so already shifted by one; -100,
        and whatever stands at or before padding, is ignored. loss: the mean over the rest, in
        nats; 0 if nothing is left.
        seed: for dropout, in training; without it nothing is dropped.
        Raises ValueError if T exceeds context_length, for an id outside the vocabulary, and under
        sequence parallelism if tp does not divide T.
        """
        x = self.hidden(input_ids, attention_mask, seed)
        logits = loss = None
        if labels is not None:
            loss, _ = self.output_head.loss(x, labels_that_count(labels, attention_mask))
        if labels is None or return_logits:
            local = self.output_head.logits(x)  # (B, T, V/tp)
            logits = gather_from_tensor_parallel_region(local, self.tp)  # (B, T, V)    all-gather
            logits = logits[..., : self.config.vocab_size]  # without the pad
        return logits, loss

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, seed: Seed = None
    ) -> Tensor:
        """What the output head reads. (B, T) -> (B, T, D), or (B, T/tp, D)"""
        T = input_ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        positions = positions_of(input_ids, attention_mask)
        mask = None if attention_mask is None else causal_padding_mask(attention_mask)
        x = self.embed(input_ids, positions)
        x = self.embedding_dropout(x, seed, (first_token(x, self.tp),))
        inputs = self.attention_inputs(positions, mask)
        for block in self.blocks:
            x = block(x, *inputs, seed=seed)
        return self.final_norm(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(B, T) ids, (T,) or (B, T) positions -> (B, T, D), or (B, T/tp, D)"""
        return self.token_embedding(ids) + self.position_embedding(own_tokens(positions, self.tp))

    def attention_inputs(self, positions: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        return (mask,)  # what a block's attention layer takes after x


def token_table(config: GPTConfig, tp: Axis, std: float = EMBEDDING_STD) -> VocabParallelEmbedding:
    """Token embedding or output head: (V, D), rows split over tp."""
    return VocabParallelEmbedding(config.vocab_size, config.d_model, tp=tp, init_std=std)


def labels_that_count(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T): labels, with -100 also for what stands at or before padding."""
    if attention_mask is None:
        return labels
    real = attention_mask.bool()
    followed = torch.cat([real[:, 1:], real[:, -1:]], dim=1)
    return labels.masked_fill(~(real & followed), IGNORED)
