"""Transformer-XL: attention that knows how far apart two tokens stand, by projected distances.

"Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (Dai et al.), section 3.3,
in the blocks of gpt.py and without the memory of earlier segments. What is not said here is as in
gpt.py, the communication too.
Shape letters: B batch, T sequence, D d_model, H heads, K width of a head; tp = tp.size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rosetrainer.config import GPTConfig
from rosetrainer.models.gpt import MultiHeadSelfAttention, TransformerBlock
from rosetrainer.models.layers import GPTWithoutPositionTable
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.dropout import Dropout, Seed
from rosetrainer.parallel.overlap import for_product
from rosetrainer.parallel.recompute import recompute
from rosetrainer.parallel.sharding import Cut, ShardSpec, new_parameter
from rosetrainer.parallel.tensor_parallel import ColumnParallelLinear


def distance_table(T: int, config: GPTConfig, weight: Tensor) -> Tensor:
    """(T, D) on weight's device: sines, then cosines, of the distances T-1, .., 1, 0."""
    pairs = torch.arange(0, config.d_model, 2, dtype=torch.float64, device=weight.device)
    distances = torch.arange(T - 1, -1, -1, dtype=torch.float64, device=weight.device)
    angles = distances[:, None] * config.rotary_base ** (-pairs / config.d_model)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return table.to(torch.promote_types(weight.dtype, torch.float32))


class DistanceProjection(ColumnParallelLinear):
    """(T, D) R -> (T, H/tp*K) V, rows of W split over tp by heads.

    Its input is a constant that every rank has whole, under sequence parallelism too: nothing is
    gathered before it, and no gradient summed behind it.
    """

    def __init__(self, D: int, width: int, tp: Axis) -> None:
        super().__init__(D, width, bias=False, tp=replace(tp, sequence_parallel=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(for_product(x), self.weight)


class RelativeAttention(MultiHeadSelfAttention):
    """Causal self-attention by content and by distance. (B, T, D) -> (B, T, D)

    A query q looks at a key k that stands d tokens before it by ((q + u) k + (q + v) r_d) / sqrt K.
    r is the projected table of distances; u and v, a vector of K for each head, are cut by heads.
    """

    def __init__(self, config: GPTConfig, tp: Axis, recompute: bool = False) -> None:
        super().__init__(config, tp, recompute)
        width = config.n_heads * config.head_width
        self.distance = DistanceProjection(config.d_model, width, tp)
        by_heads = ShardSpec((width,), (Cut(tp, 0),))
        self.content_bias = new_parameter(by_heads)  # u
        self.distance_bias = new_parameter(by_heads)  # v

    def forward(  # type: ignore[override]
        self, x: Tensor, table: Tensor, mask: Tensor | None = None, seed: Seed = None
    ) -> Tensor:
        """table: of `distance_table`. mask: as MultiHeadSelfAttention's."""
        K = self.head_width
        fused = self.query_key_value(x).unflatten(-1, (3, -1, K))  # (B, T, 3, H/tp, K)
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H/tp, T, K)
        distance = self.distance(table).unflatten(-1, (-1, K)).transpose(0, 1)  # (H/tp, T, K)
        u, v = (b.view(-1, 1, K) for b in (self.content_bias, self.distance_bias))
        inputs = (query + u, query + v, key, distance, value, mask, self.dropout, seed, self.tp)
        heads = recompute(attend_by_distance, *inputs, enabled=self.recompute, tp=self.tp)
        return self.dense(heads.transpose(1, 2).flatten(2))


def attend_by_distance(
    by_content: Tensor,
    by_distance: Tensor,
    key: Tensor,
    distance: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: Dropout,
    seed: Seed,
    tp: Axis,
) -> Tensor:
    """Two of queries, keys and values (B, H/tp, T, K), and distances (H/tp, T, K) from the farthest
    on -> (B, H/tp, T, K). Causal where no mask is given."""
    scores = by_content @ key.mT + key_for_distance(by_distance @ distance.mT)  # (B, H/tp, T, T)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = (scores / math.sqrt(key.shape[-1])).masked_fill(~mask, -math.inf)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    first = (tp.rank * key.shape[1], 0)  # coordinates count from this rank's first head on
    return dropout(probabilities, seed, first).to(value.dtype) @ value


def key_for_distance(scores: Tensor) -> Tensor:
    """(.., T, T) of query i at distance T-1-j -> of query i and key j, where j is at most i.

    Row i has to move T-1-i places to the left: a column before the first makes each row begin one
    place later in the memory than the one above it, so that one view moves them all.
    """
    T = scores.shape[-1]
    longer = F.pad(scores, (1, 0)).flatten(-2)  # (.., T*(T+1))
    return longer[..., T:].unflatten(-1, (T, T))


class TransformerXLBlock(TransformerBlock):
    attention_class = RelativeAttention


class TransformerXL(GPTWithoutPositionTable):
    """A decoder-only transformer whose tokens know distances, and no positions."""

    block_class = TransformerXLBlock

    def attention_inputs(self, positions: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        weight = next(self.parameters())
        return distance_table(positions.shape[-1], self.config, weight), mask
