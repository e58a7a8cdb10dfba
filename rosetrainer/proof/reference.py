"""The dense oracle: the same GPT in plain nn.Linear and F.*, one process, no layer of ours.

Slow and simple on purpose. Its parameters have the names and shapes that gather_whole gives, so
load_state_dict takes them. Attention is written out; a padded row is computed by cutting the
padding off.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosetrainer.config import GPTConfig

Drop = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class ReferenceDropout:
    """What dropout multiplies a whole activation by, in numpy's unsigned integers.

    Whether an element is dropped is decided by a 16-bit lane of a hash of (seed, step, site,
    coordinates).
    """

    p: float = 0.0
    seed: int = 0
    step: int = 0

    def __call__(self, site: str, x: Tensor, row: int) -> Tensor:
        """x: (1, .., n), the sample number `row` of the global batch."""
        if not self.p:
            return x
        digest = hashlib.sha256(f"{self.seed}:{self.step}:{site}".encode()).digest()
        bits = np.array(int.from_bytes(digest[:8], "little"), dtype=np.uint64)
        *sizes, n = x.shape
        for place in (np.array([row]), *map(np.arange, sizes[1:]), np.arange(n) // 4):
            bits = bits[..., None] + (place + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        lanes = (bits >> (16 * (np.arange(n) % 4)).astype(np.uint64)).astype(np.uint16)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        kept = lanes.view(np.int16).astype(int) + 2**15 >= dropped
        return x * torch.from_numpy(kept * (2**16 / (2**16 - dropped))).to(x)


class ReferenceAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.head_width = config.n_heads, config.head_width
        width = self.n_heads * self.head_width
        self.query_key_value = nn.Linear(config.d_model, 3 * width, bias=config.bias)
        self.dense = nn.Linear(width, config.d_model, bias=config.bias)

    def positioned(self, head: Tensor) -> Tensor:
        """(1, T, K) queries or keys: here the embeddings have their positions already."""
        return head

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        T = x.shape[1]
        heads = [t.chunk(self.n_heads, dim=-1) for t in self.query_key_value(x).chunk(3, dim=-1)]
        future = torch.triu(torch.ones(T, T, device=x.device), diagonal=1) > 0
        probabilities = []
        for query, key in zip(heads[0], heads[1], strict=True):
            scores = self.positioned(query) @ self.positioned(key).mT / math.sqrt(self.head_width)
            probabilities.append(scores.masked_fill(future, -math.inf).softmax(-1))  # (1, T, T)
        dropped = drop("dropout", torch.stack(probabilities, dim=1)).unbind(1)
        results = [p @ value for p, value in zip(dropped, heads[2], strict=True)]
        return self.dense(torch.cat(results, dim=-1))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class ReferenceFeedForward(nn.Module):
    def __init__(self, config: GPTConfig, formula: Callable[[Tensor], Tensor] = gelu_tanh) -> None:
        super().__init__()
        self.formula = formula
        self.dense_h_to_4h = nn.Linear(config.d_model, config.ff_width, bias=config.bias)
        self.dense_4h_to_h = nn.Linear(config.ff_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.formula(self.dense_h_to_4h(x)))


class ReferenceBlock(nn.Module):
    attention_class, feed_forward_class = ReferenceAttention, ReferenceFeedForward

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = self.norm(config)
        self.attention = self.attention_class(config)
        self.feed_forward_norm = self.norm(config)
        self.feed_forward = self.feed_forward_class(config)

    @staticmethod
    def norm(config: GPTConfig) -> nn.Module:
        return nn.LayerNorm(config.d_model, bias=config.bias)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        def drop_within(site: str, x: Tensor) -> Tensor:
            return drop(f"attention.{site}", x)

        attended = self.attention(self.attention_norm(x), drop_within)
        x = x + drop("attention_dropout", attended)
        return x + drop("feed_forward_dropout", self.feed_forward(self.feed_forward_norm(x)))


class ReferenceGPT(nn.Module):
    """What GPTModel must compute in every layout."""

    block_class, has_position_table = ReferenceBlock, True

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if self.has_position_table:
            self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config.n_layers))
        self.final_norm = self.block_class.norm(config)
        if not config.tied:
            self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tied = config.tied

    def logits(self, input_ids: Tensor, dropout: ReferenceDropout, row: int) -> Tensor:
        """(1, T) without padding, the global batch's sample number `row` -> (1, T, V)"""
        x = self.token_embedding(input_ids)
        if self.has_position_table:
            x = x + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        x = dropout("embedding_dropout", x, row)
        for number, block in enumerate(self.blocks):
            x = block(x, lambda site, t, n=number: dropout(f"blocks.{n}.{site}", t, row))
        head = self.token_embedding if self.tied else self.output_head
        return self.final_norm(x) @ head.weight.T

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        dropout: ReferenceDropout = ReferenceDropout(),
        first_row: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, loss) as GPTModel.forward defines them; logits are 0 at padding.

        first_row: of the batch in the global batch, for dropout, which counts tokens where they
        stand, so it goes with rows that have no padding.
        """
        assert attention_mask is None or not dropout.p
        rows, losses = [], []
        for row, ids in enumerate(input_ids):
            mask = torch.ones_like(ids) if attention_mask is None else attention_mask[row]
            real = [t for t in range(len(ids)) if mask[t]]
            short = self.logits(ids[real][None], dropout, first_row + row)[0]  # (tokens, V)
            padded = short.new_zeros(len(ids), short.shape[1])
            rows.append(padded.index_copy(0, torch.tensor(real, device=ids.device), short))
            for t, log_probability in zip(real, short.log_softmax(-1), strict=True):
                padding_follows = t + 1 < len(ids) and not mask[t + 1]
                if labels is not None and labels[row, t] != -100 and not padding_follows:
                    losses.append(-log_probability[labels[row, t]])
        logits = torch.stack(rows)
        if labels is None:
            return logits, None
        return logits, torch.stack(losses).mean() if losses else logits.sum() * 0
