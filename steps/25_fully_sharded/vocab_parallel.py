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
    all_gather,
    all_reduce_,
    leave_tensor_parallel_region,
    start_all_reduce,
    start_reduce_scatter,
)
from config import IGNORED
from overlap import column_linear, for_product
from parallel_context import Axis
from sharding import Cut, ShardSpec, new_parameter, shard_spec
from tensor_parallel import width_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of logits that the loss holds at a time; a GPU's products want more rows than a CPU's.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
ROWS_OF_A_SUM = 2048  # of the weight's gradient on a CPU, where products are shorter than their sum
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
        return column_linear(x, self.weight, None, self.tp)  # backward: sum over tp

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The table as output head, and the loss, in nats and fp32 or better: (mean, losses).

        x: (B, T, D), or (B, T/tp, D) under sequence parallelism. labels and losses: (B, T). A label
        of -100 is ignored, its loss 0; the mean over none is 0. Only the mean has a gradient.
        Raises ValueError for a label that is neither -100 nor in the vocabulary.
        """
        counts = labels != IGNORED
        labels = labels.masked_fill(~counts, 0)
        check_ids(labels, self.vocab_size)
        loss_weights = counts.to(_sum_dtype(x)) / counts.sum().clamp(min=1)
        mean, losses = linear_cross_entropy(
            x, self.weight, labels, loss_weights, self.vocab_size, self.tp
        )
        return mean, losses.masked_fill(~counts, 0)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary, which would else read as a zero row."""
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        wrong = int(ids[outside][0])
        raise ValueError(f"token id {wrong} is not in the vocabulary of 0 to {vocab_size - 1}")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, vocab_size: int, tp: Axis
) -> tuple[Tensor, Tensor]:
    """(sum of loss_weights x losses, losses), the losses -log p of each label in nats.

    x @ weightᵀ are the logits.

    x: (B, T, D), or (B, T/tp, D) under sequence parallelism; weight: (V/tp, D), this rank's rows,
    with pad, which counts for nothing; labels, loss_weights and losses: (B, T). Only the sum has a
    gradient. Since a token's share in it is known from the start, a chunk's logits serve the loss
    and both gradients, and are gone before the next chunk's are made: what is kept for the
    backward pass are the gradients of x (B, T, D) and weight, still to be scaled. The idea is that
    of "Liger Kernel: Efficient Triton Kernels for LLM Training" (Hsu et al.).

        forward  L = X Wᵀ, a chunk at a time    (n, V/tp) V; all-reduces over tp of (n,) and (2, n)
        dgrad    dX = dL W                      (B, T, D) P, all-reduce over tp (`f`): I
        wgrad    dW = dLᵀ X                     (V/tp, D), stays on its rank

    Under sequence parallelism X is all-gathered first, and dX reduce-scattered to (B, T/tp, D) V.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    inputs = (for_product(x), weight, labels, loss_weights, vocab_size, tp, wanted)
    loss, losses = _LinearCrossEntropy.apply(*inputs)
    return loss, losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are made forward; backward scales them and sums that of x over tp."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        vocab_size: int,
        tp: Axis,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        x = all_gather(x, tp, "forward", dim=-2) if tp.sequence_parallel else x  # (B, T, D)
        rows, table, dtype = x.flatten(0, 1), for_product(weight), _sum_dtype(x)
        losses, weight_gradient = torch.empty_like(loss_weights), None
        if wanted:
            x_gradient = torch.empty_like(rows)
        if wanted and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=dtype)
        step = rows_of_a_chunk(len(weight), dtype.itemsize, x.device.type)
        for chunk in (slice(first, first + step) for first in range(0, len(rows), step)):
            logits = F.linear(rows[chunk], table).to(dtype)  # (rows of the chunk, V/tp)
            own = (labels.flatten()[chunk], loss_weights.flatten()[chunk])
            losses.view(-1)[chunk] = _cross_entropy_(logits, *own, vocab_size, tp)
            if wanted:
                logits = logits.to(x.dtype)  # now their gradient
                torch.mm(logits, table, out=x_gradient[chunk])  # partial
                if weight_gradient is not None:
                    _add_product_(weight_gradient, logits.T, rows[chunk])
            del logits  # before the next chunk's are made
        if wanted:
            ctx.save_for_backward(x_gradient.view_as(x), weight_gradient)
            ctx.tp = tp
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient, weight_gradient = ctx.saved_tensors
        partial = x_gradient * gradient
        if ctx.tp.sequence_parallel:
            summing = start_reduce_scatter(partial, ctx.tp, "backward", dim=-2)
        else:
            summing = start_all_reduce(partial, ctx.tp, "backward")
        if weight_gradient is not None:
            weight_gradient *= gradient  # while the sum is under way; a second backward would see
        return summing.wait(), weight_gradient, None, None, None, None, None


def rows_of_a_chunk(columns: int, width: int, device: str = "cpu") -> int:
    """How many tokens' logits, of `width` bytes each, the loss holds at a time; at least one's."""
    return max(CHUNK_BYTES[device] // (columns * width), 1)


def _cross_entropy_(
    logits: Tensor, labels: Tensor, loss_weights: Tensor, vocab_size: int, tp: Axis
) -> Tensor:
    """(n,) losses of a chunk of n tokens; overwrites its logits (n, V/tp) with their gradient.

    log(sum of exp(logits - max)) - (logit of the label - max); backward share x (softmax -
    one-hot). The slices stay where they are: three numbers a token travel, not V.
    """
    width = logits.shape[-1]
    first = tp.rank * width
    logits[:, max(vocab_size - first, 0) :] = -math.inf  # the pad
    logits -= all_reduce_(logits.amax(-1), tp, "forward", dist.ReduceOp.MAX)[:, None]
    here = (first <= labels) & (labels < first + width)
    index = (labels - first).masked_fill(~here, 0)[:, None]
    target = logits.gather(-1, index)[:, 0].masked_fill(~here, 0)  # one rank has it
    sums = torch.stack([logits.exp_().sum(-1), target])
    total, target = all_reduce_(sums, tp, "forward")
    logits *= (loss_weights / total)[:, None]
    logits.scatter_add_(-1, index, (-loss_weights).masked_fill(~here, 0)[:, None])
    return total.log() - target


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype where the product's is shorter."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    # On a CPU in blocks that stay in its cache between the product and the sum.
    size = ROWS_OF_A_SUM if total.device.type == "cpu" else len(total)
    for block, rows in zip(total.split(size), a.split(size), strict=True):
        block += rows @ b


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
