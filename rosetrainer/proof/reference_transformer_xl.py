"""The dense oracle of TransformerXL in plain modules, head by head and pair by pair.

"Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (Dai et al.): the four
terms of its scores as the paper writes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import (
    Drop,
    ReferenceAttention,
    ReferenceBlock,
    ReferenceGPT,
)


class ReferenceRelativeAttention(ReferenceAttention):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        width = self.n_heads * self.head_width
        self.distance = nn.Linear(config.d_model, width, bias=False)
        self.content_bias = nn.Parameter(torch.empty(width))
        self.distance_bias = nn.Parameter(torch.empty(width))
        self.base = config.rotary_base

    def embedded(self, distance: int, x: Tensor) -> Tensor:
        """(D,): its sines at all speeds, then its cosines."""
        D = x.shape[-1]
        angles = [distance * self.base ** (-i / D) for i in range(0, D, 2)]
        return x.new_tensor([*map(math.sin, angles), *map(math.cos, angles)])

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        T, K = x.shape[1], self.head_width
        queries, keys, values = self.query_key_value(x).chunk(3, dim=-1)
        distances = self.distance(torch.stack([self.embedded(d, x) for d in range(T)]))  # (T, H*K)
        probabilities = []
        for head in range(self.n_heads):
            own = slice(head * K, (head + 1) * K)
            u, v = self.content_bias[own], self.distance_bias[own]
            rows = []
            for i in range(T):
                query, key = queries[0, i, own], keys[0, : i + 1, own]
                back = distances[torch.arange(i, -1, -1, device=x.device), own]  # i, .., 1, 0
                score = key @ query + back @ query + key @ u + back @ v
                row = (score / math.sqrt(K)).softmax(-1)
                rows.append(torch.cat([row, row.new_zeros(T - i - 1)]))
            probabilities.append(torch.stack(rows)[None])  # (1, T, T)
        dropped = drop("dropout", torch.stack(probabilities, dim=1)).unbind(1)
        results = [p @ value for p, value in zip(dropped, values.split(K, dim=-1), strict=True)]
        return self.dense(torch.cat(results, dim=-1))


class ReferenceTransformerXLBlock(ReferenceBlock):
    attention_class = ReferenceRelativeAttention


class ReferenceTransformerXL(ReferenceGPT):
    """What TransformerXL must compute in every layout."""

    block_class, has_position_table = ReferenceTransformerXLBlock, False
