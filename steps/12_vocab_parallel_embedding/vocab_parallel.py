"""The vocabulary, split over tp: each rank holds the rows of its own slice of the token ids.

Shape letters: B batch, T sequence, D d_model, V vocabulary; tp = tp.size. A letter behind a shape
says what a rank has of it over tp: I the same on each, V a part of its own, P a partial sum.

From "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(Shoeybi et al.).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from comm import copy_to_tensor_parallel_region, reduce_from_tensor_parallel_region
from parallel_context import Axis
from sharding import Cut, ShardSpec, new_parameter, shard_spec
from tensor_parallel import width_of
from torch import Tensor, nn

PADDED_TO = 128  # rows: a multiple that most tp sizes divide, and that matrix products like


class VocabParallelEmbedding(nn.Module):
    """(..) ids -> (.., D): a table (V, D) whose rows are split over tp; (V/tp, D) on a rank.

        forward  Y = W[ids], 0 where another rank has the row    (.., D) P, all-reduce over tp: I
        wgrad    dW[ids] += dY                                   (V/tp, D), stays on its rank

    V is padded with rows of zeros to a multiple of 128, and of tp where tp does not divide that.
    No id reads a pad row, `logits` of one mean nothing, and no checkpoint holds it.
    Raises ValueError for an id that is not in the vocabulary.
    """

    def __init__(self, vocab_size: int, d_model: int, *, tp: Axis, init_std: float) -> None:
        super().__init__()
        self.vocab_size, self.tp = vocab_size, tp
        pad = -vocab_size % math.lcm(PADDED_TO, tp.size)
        shape = (vocab_size, d_model)
        spec = ShardSpec(shape, (Cut(tp),), pad=(pad, 0), init_std=init_std, decay=True)
        self.weight = new_parameter(spec)

    def extra_repr(self) -> str:
        spec, rows = shard_spec(self.weight), self.tp.size * self.weight.shape[0]
        return f"ids={width_of(spec, 0)}, padded to {rows}, width={spec.shape[1]}"

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.vocab_size)
        rows = self.weight.shape[0]
        local = ids - self.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        x = x.masked_fill(elsewhere[..., None], 0)  # the rank that holds the row adds it
        return reduce_from_tensor_parallel_region(x, self.tp)  # (.., D)    all-reduce

    def logits(self, x: Tensor) -> Tensor:
        """The table as output head, column-parallel. (B, T, D) -> (B, T, V/tp), pad rows too.

        forward  L = X Wᵀ     (B, T, D) I -> (B, T, V/tp) V
        dgrad    dX = dL W    (B, T, D) P, all-reduce over tp (`f`): I
        wgrad    dW = dLᵀ X   (V/tp, D), stays on its rank
        """
        x = copy_to_tensor_parallel_region(x, self.tp)  # backward: all-reduce
        return F.linear(x, self.weight)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary, which would else read as a zero row."""
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        wrong = int(ids[outside][0])
        raise ValueError(f"token id {wrong} is not in the vocabulary of 0 to {vocab_size - 1}")
