"""The GPT of "Language Models are Unsupervised Multitask Learners" (GPT-2), tensor-parallel.

Shape letters: B batch, T sequence, D d_model, F d_ff, V vocabulary, H heads, K width of a head;
tp = tp.size. One model serves every layout: at tp 1 the layers communicate nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from config import IGNORED, GPTConfig
from parallel_context import Axis, ParallelContext
from sharding import ShardSpec, new_parameter
from tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

EMBEDDING_STD = 0.02


class LayerNorm(nn.Module):
    """Layer norm over D, the same on every rank."""

    def __init__(self, d_model: int, bias: bool) -> None:
        super().__init__()
        self.weight = new_parameter(ShardSpec((d_model,), init_mean=1.0))
        self.bias = new_parameter(ShardSpec((d_model,))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class Embedding(nn.Module):
    """(..) ids -> (.., D): a table (n, D), the same on every rank."""

    def __init__(self, n: int, d_model: int, decay: bool) -> None:
        super().__init__()
        self.weight = new_parameter(ShardSpec((n, d_model), init_std=EMBEDDING_STD, decay=decay))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention, heads split over tp. (B, T, D) -> (B, T, D)

    A rank computes H/tp heads from first to last: one all-reduce forward (after `dense`), one
    backward (before `query_key_value`).
    """

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        width = config.n_heads * config.head_width  # H*K, which need not be D
        self.head_width = config.head_width
        self.query_key_value = ColumnParallelLinear(
            config.d_model, 3 * width, config.bias, stride=3, tp=tp
        )
        self.dense = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=residual_std(width, config)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, 1, T, T), true where a query may look at a key; causal unless given."""
        fused = self.query_key_value(x)  # (B, T, 3*H/tp*K)
        fused = fused.unflatten(-1, (3, -1, self.head_width))  # (B, T, 3, H/tp, K)
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, T, K)
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        return self.dense(heads.transpose(1, 2).flatten(2))  # (B, T, H/tp*K) -> (B, T, D)


class FeedForward(nn.Module):
    """Column then row, nothing gathered between. (B, T, D) -> (B, T, D)

    GELU acts on each feature alone, so a slice of the features can pass through it; a partial sum
    could not. One all-reduce forward, one backward.
    """

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        width = config.ff_width
        self.dense_h_to_4h = ColumnParallelLinear(config.d_model, width, config.bias, tp=tp)
        self.dense_4h_to_h = RowParallelLinear(
            width, config.d_model, config.bias, tp=tp, init_std=residual_std(width, config)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.dense_h_to_4h(x), approximate="tanh")  # (B, T, F/tp)
        return self.dense_4h_to_h(hidden)  # (B, T, D)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: GPTConfig, tp: Axis) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.d_model, config.bias)
        self.attention = MultiHeadSelfAttention(config, tp)
        self.feed_forward_norm = LayerNorm(config.d_model, config.bias)
        self.feed_forward = FeedForward(config, tp)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPTModel(nn.Module):
    """A decoder-only transformer. Weights are empty until init_weights or load_whole fills them.

    Raises ConfigError if context.tp cannot share the heads or the feed-forward layer.
    """

    def __init__(self, config: GPTConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        context = context or ParallelContext()
        config.check(context.tp.size)
        self.config = config
        with context.device:
            self.token_embedding = Embedding(config.vocab_size, config.d_model, decay=True)
            self.position_embedding = Embedding(config.context_length, config.d_model, decay=False)
            self.blocks = nn.ModuleList(
                TransformerBlock(config, context.tp) for _ in range(config.n_layers)
            )
            self.final_norm = LayerNorm(config.d_model, config.bias)
            # Tied, it is the same module under a second name, and its weight one parameter.
            self.output_head = (
                self.token_embedding
                if config.tied
                else Embedding(config.vocab_size, config.d_model, decay=True)
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss); logits are None with labels and return_logits=False.

        input_ids: (B, T). logits: (B, T, V).
        attention_mask: (B, T), 1 for a token, 0 for padding on either side; positions count the
        tokens only, so padding moves nothing. Logits at padding mean nothing.
        labels: (B, T), the token that should FOLLOW each input, so already shifted by one; -100,
        and whatever stands at or before padding, is ignored. loss: the mean over the rest, in
        nats; 0 if nothing is left.
        Raises ValueError if T exceeds context_length.
        """
        T = input_ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        positions = positions_of(input_ids, attention_mask)
        mask = None if attention_mask is None else causal_padding_mask(attention_mask)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)  # (B, T, D)
        for block in self.blocks:
            x = block(x, mask)
        logits = F.linear(self.final_norm(x), self.output_head.weight)  # (B, T, V)
        if labels is None:
            return logits, None
        loss = mean_loss(logits, labels, attention_mask)
        return (logits if return_logits else None), loss


def residual_std(fan_in: int, config: GPTConfig) -> float:
    """For what is added to the residual stream, 2 x n_layers times: GPT-2 scales it down."""
    return 1 / math.sqrt(fan_in * 2 * config.n_layers)


def positions_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(T,), or (B, T) where a mask (B, T) says what is padding: it is not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def causal_padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): a query sees the tokens up to itself, padding sees itself.

    Softmax over nothing is nothing: kernels differ in what they make of a row without any key.
    """
    T = attention_mask.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=attention_mask.device)
    return (causal & attention_mask.bool()[:, None, :] | itself)[:, None]


def mean_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The mean cross-entropy in nats over the labels that count; 0 if none does.

    logits: (B, T, V). labels: (B, T), -100 is ignored, and what stands at or before padding.
    """
    if attention_mask is not None:
        real = attention_mask.bool()
        followed = torch.cat([real[:, 1:], real[:, -1:]], dim=1)
        labels = labels.masked_fill(~(real & followed), IGNORED)
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)
