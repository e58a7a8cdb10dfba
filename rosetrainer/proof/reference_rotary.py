"""The dense oracle of RotaryGPT in plain modules, pair by pair and head by head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import Drop, ReferenceDropout, ReferenceFeedForward, ReferenceGPT


def standardized(x: Tensor) -> Tensor:
    """(.., D): mean 0, variance 1."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class ReferenceRotaryAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.head_width = config.n_heads, config.head_width
        self.base = config.rotary_base
        width = self.n_heads * self.head_width
        self.query_key_value = nn.Linear(config.d_model, 3 * width, bias=config.bias)
        self.dense = nn.Linear(width, config.d_model, bias=config.bias)

    def rotated(self, x: Tensor) -> Tensor:
        """(1, T, K): features 2i and 2i+1 at position t, rotated by the angle t x base^(-2i/K)."""
        positions = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        columns: list[Tensor] = []
        for i in range(0, self.head_width, 2):
            angle = positions * self.base ** (-i / self.head_width)
            a, b = x[..., i], x[..., i + 1]
            columns += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return torch.stack(columns, -1)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        T = x.shape[1]
        heads = [
            part.chunk(self.n_heads, dim=-1) for part in self.query_key_value(x).chunk(3, dim=-1)
        ]
        future = torch.ones(T, T, device=x.device).triu(diagonal=1) > 0
        probabilities = []
        for query, key in zip(heads[0], heads[1], strict=True):
            scores = self.rotated(query) @ self.rotated(key).mT / math.sqrt(self.head_width)
            probabilities.append(scores.masked_fill(future, -math.inf).softmax(-1))
        dropped = drop("dropout", torch.stack(probabilities, dim=1)).unbind(1)
        results = [p @ value for p, value in zip(dropped, heads[2], strict=True)]
        return self.dense(torch.cat(results, dim=-1))


class ReferenceSquaredReLU(ReferenceFeedForward):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense_h_to_4h(x)
        return self.dense_4h_to_h(hidden * hidden * (hidden > 0))


class ReferenceRotaryBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = ReferenceRotaryAttention(config)
        self.feed_forward = ReferenceSquaredReLU(config)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        def drop_within(site: str, x: Tensor) -> Tensor:
            return drop(f"attention.{site}", x)

        x = x + drop("attention_dropout", self.attention(standardized(x), drop_within))
        return x + drop("feed_forward_dropout", self.feed_forward(standardized(x)))


class ReferenceRotaryGPT(ReferenceGPT):
    """What RotaryGPT must compute in every layout."""

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(ReferenceRotaryBlock(config) for _ in range(config.n_layers))
        self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def logits(self, input_ids: Tensor, dropout: ReferenceDropout, row: int) -> Tensor:
        x = dropout("embedding_dropout", self.token_embedding(input_ids), row)
        for number, block in enumerate(self.blocks):
            x = block(x, lambda site, t, n=number: dropout(f"blocks.{n}.{site}", t, row))
        return self.output_head(standardized(x))
