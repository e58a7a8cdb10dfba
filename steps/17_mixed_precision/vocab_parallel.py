"""The vocabulary, split over tp: embedding, output head and loss on a slice of the token ids.

Shape letters: B batch, T sequence, D d_model, V vocabulary; tp = tp.size. A letter behind a shape
says what a rank has of it over tp: I the same on each, V a part of its own, P a partial sum.

From "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(Shoeybi et al.).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from comm import (
    all_reduce_,
    enter_tensor_parallel_region,
    leave_tensor_parallel_region,
)
from config import IGNORED
from parallel_context import Axis
from sharding import Cut, ShardSpec, new_parameter, shard_spec
from tensor_parallel import for_product, width_of
from torch import Tensor, nn

PADDED_TO = 128  # rows: a multiple that most tp sizes divide, and that matrix products like


class VocabParallelEmbedding(nn.Module):
    """(B, T) ids -> (B, T, D), or (B, T/tp, D) under sequence parallelism: a table (V, D) whose
    rows are split over tp, (V/tp, D) on a rank.

        forward  Y = W[ids], 0 where another rank has the row    (.., D) P, all-reduce over tp: I
        wgrad    dW[ids] += dY                                   (V/tp, D), stays on its rank

    Under sequence parallelism a reduce-scatter of the tokens takes the all-reduce's place, and
    backward dY is all-gathered.

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
        return leave_tensor_parallel_region(x, self.tp)  # (.., D)    sum over tp

    def logits(self, x: Tensor) -> Tensor:
        """The table as output head, column-parallel. (B, T, D) -> (B, T, V/tp), pad rows too.

        forward  L = X Wᵀ     (B, T, D) I -> (B, T, V/tp) V
        dgrad    dX = dL W    (B, T, D) P, all-reduce over tp (`f`): I
        wgrad    dW = dLᵀ X   (V/tp, D), stays on its rank

        Under sequence parallelism X is all-gathered first, and dX reduce-scattered to its tokens.
        """
        x = enter_tensor_parallel_region(for_product(x), self.tp)  # (B, T, D)    backward: sum
        return F.linear(x, self.weight)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary, which would else read as a zero row."""
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        wrong = int(ids[outside][0])
        raise ValueError(f"token id {wrong} is not in the vocabulary of 0 to {vocab_size - 1}")


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis
) -> Tensor:
    """(B, T): -log p of each label in nats, 0 where it is -100; in fp32 or better.

    logits: (B, T, V/tp), this rank's slice, with pad, which counts for nothing. labels: (B, T).
    The slices stay where they are: three numbers a token travel, not V.

        forward  log sum of exp(L) - L[label]    (B, T) I, three all-reduces over tp of (B, T)
        dgrad    dL = softmax(L) - one-hot       (B, T, V/tp) V, no collective

    Raises ValueError for a label that is neither -100 nor in the vocabulary.
    """
    counts = labels != IGNORED
    labels = labels.masked_fill(~counts, 0)
    check_ids(labels, vocab_size)
    return _CrossEntropy.apply(logits, labels, vocab_size, tp).masked_fill(~counts, 0)


class _CrossEntropy(torch.autograd.Function):
    """log(sum of exp(logits - max)) - (logit of the label - max); softmax - one-hot backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
        width = logits.shape[-1]
        first = tp.rank * width
        own = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        own[..., max(vocab_size - first, 0) :] = -math.inf  # the pad
        own -= all_reduce_(own.amax(-1), tp, "forward", dist.ReduceOp.MAX)[..., None]
        here = (first <= labels) & (labels < first + width)
        index = (labels - first).masked_fill(~here, 0)[..., None]
        target = own.gather(-1, index)[..., 0].masked_fill(~here, 0)  # one rank has it
        target = all_reduce_(target, tp, "forward")
        own.exp_()
        total = all_reduce_(own.sum(-1), tp, "forward")
        ctx.save_for_backward(own.div_(total[..., None]), index, here)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        softmax, index, here = ctx.saved_tensors
        gradient = gradient[..., None]
        result = softmax * gradient
        result.scatter_add_(-1, index, (-gradient).masked_fill(~here[..., None], 0))
        return result.to(ctx.dtype), None, None, None
