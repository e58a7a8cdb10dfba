"""Output head and loss in chunks: the mean, every gradient, what moves and what is held.

Shape letters: B batch, T sequence, D d_model, V vocabulary; tp = tp.size.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal
from peak import Peak
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import IGNORED, ParallelConfig
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel import vocab_parallel
from rosetrainer.parallel.comm import own_slice
from rosetrainer.parallel.context import Axis, init_parallel
from rosetrainer.parallel.sharding import load_whole, shard_spec
from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding
from rosetrainer.planner.loss import bytes_in_chunks

B, T, D, V = 3, 8, 12, 139  # four ranks hold 64, 64, 11 and 0 rows, the rest is pad
UPSTREAM = -1.7


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_of_every_slice() -> Tensor:
    """On both sides of each cut; tokens 14 to 20, a chunk of seven, count for nothing."""
    labels = torch.tensor([0, 63, 64, 127, 128, 138] * 4).view(B, T)
    labels.view(-1)[14:21] = labels.view(-1)[1] = IGNORED
    return labels


def in_chunks_of(rows: int, columns: int, width: int = 8) -> Any:
    return mock.patch.dict(vocab_parallel.CHUNK_BYTES, cpu=rows * columns * width + 1)


def dense_loss(x: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the whole tensors, by torch's own functions: mean, losses and gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (x @ weight.T).transpose(1, 2)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    mean = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    (UPSTREAM * mean).backward()
    assert x.grad is not None and weight.grad is not None
    return {"mean": mean, "losses": losses, "x.grad": x.grad, "weight.grad": weight.grad}


def our_loss(table: VocabParallelEmbedding, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of this rank: its tokens' gradient under sequence parallelism, its rows' of the weight."""
    x = (own_slice(x, table.tp, 1) if table.tp.sequence_parallel else x).clone().requires_grad_()
    mean, losses = table.loss(x, labels)
    assert not losses.requires_grad
    (UPSTREAM * mean).backward()
    assert x.grad is not None and table.weight.grad is not None
    return {"mean": mean, "losses": losses, "x.grad": x.grad, "weight.grad": table.weight.grad}


def table_with(weight: Tensor, tp: Axis) -> VocabParallelEmbedding:
    """Its pad rows, zero in a model, are not: they must not count."""
    table = VocabParallelEmbedding(len(weight), weight.shape[1], tp=tp, init_std=1.0)
    table.to(weight.dtype)
    load_whole(table, {"weight": weight})
    pad = pad_rows(table)
    table.weight.data[pad] = 9
    return table


def pad_rows(table: VocabParallelEmbedding) -> slice:
    return slice(max(table.vocab_size - table.tp.rank * len(table.weight), 0), None)


def check_parity(sequence_parallel: bool, rows: int) -> None:
    tp = init_parallel(ParallelConfig(sequence_parallel=sequence_parallel)).tp
    x, weight, labels = random(B, T, D, seed=1), random(V, D, seed=2), labels_of_every_slice()
    expected, table = dense_loss(x, weight, labels), table_with(weight, tp)
    tp.ledger.clear()
    with in_chunks_of(rows, len(table.weight)):
        ours = our_loss(table, x, labels)
    assert (ours["weight.grad"][pad_rows(table)] == 0).all()
    ours["weight.grad"] = shard_spec(table.weight).unshard(ours["weight.grad"], "checkpoint")
    if tp.sequence_parallel:
        expected["x.grad"] = own_slice(expected["x.grad"], tp, 1)
    for name, dense in expected.items():
        assert_equal(name, ours[name], dense)
    if tp.size > 1:
        calls = tp.ledger.entries["all_reduce", "forward"].calls
        assert calls == 2 * math.ceil(B * T / rows)
        summed = "reduce_scatter" if sequence_parallel else "all_reduce"
        assert tp.ledger.entries[summed, "backward"].calls == 1


@pytest.mark.parametrize("rows", [7, 8, 1000])  # the last chunk shorter; as long; the only one
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_loss_and_gradients_equal_dense(tp_size: int, sequence_parallel: bool, rows: int) -> None:
    run_ranks(tp_size, check_parity, sequence_parallel, rows)


U = 2**-8  # bf16's unit roundoff
U32 = 2**-24


def check_bf16() -> None:
    """Numbers that bf16 holds go in, so that each rounding after that has its place in the bound.

    A logit is off by `off`: its sum's rounding in fp32 and its own in bf16; a loss, the difference
    of two of them, by twice that, and so is the exponent of a softmax. The gradient of the logits
    is rounded to bf16, and so are a chunk's products with it, their sum over ranks, and the scaling
    by what comes from upstream.
    """
    tp = init_parallel(ParallelConfig()).tp
    x, weight = (random(*shape, seed=3).bfloat16().float() for shape in ((B, T, D), (V, D)))
    labels = labels_of_every_slice()
    exact = dense_loss(x.double(), weight.double(), labels)
    table = table_with(weight, tp)
    with in_chunks_of(7, len(table.weight), 4), autocast_for(torch.bfloat16, x.device)():
        ours = our_loss(table, x, labels)
    ours["weight.grad"] = shard_spec(table.weight).unshard(ours["weight.grad"], "checkpoint")
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    rows, table_sizes = x.double().flatten(0, 1), weight.double().abs()
    logits = rows @ weight.double().T
    sums = rows.abs() @ table_sizes.T  # of the sizes of what is added up
    off = float((U * logits.abs() + D * U32 * sums * (1 + U)).max())
    counts = labels.flatten() != IGNORED
    share = abs(UPSTREAM) * counts / counts.sum()
    target = F.one_hot(labels.flatten().clamp(min=0), V)
    softmax = logits.softmax(-1)
    size = share[:, None] * (softmax - target).abs()
    wrong = share[:, None] * softmax * math.expm1(2 * off + (V + 10) * U32)
    bound = wrong + U * (size + wrong)
    roundings = (1 + U) ** 3 * (1 + (V + B * T) * U32) - 1  # product, sum over ranks, upstream
    bounds = {
        "losses": torch.full((B, T), 2 * off + (V + 10) * U32).double(),
        "x.grad": (bound @ table_sizes + roundings * ((size + bound) @ table_sizes)).view(B, T, D),
        "weight.grad": bound.T @ rows.abs() + roundings * ((size + bound).T @ rows.abs()),
    }
    for name, limit in bounds.items():
        difference = (ours[name] - exact[name]).abs()
        assert 0 < difference.max(), f"{name}: nothing was rounded to bf16"
        assert (difference <= limit).all(), f"{name}: {(difference / limit).max():.3g} x its bound"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_in_bf16_each_rounding_is_within_its_bound(tp_size: int) -> None:
    run_ranks(tp_size, check_bf16)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_leaves_the_other_gradient_as_it_is(frozen: str) -> None:
    x, weight, labels = random(B, T, D, seed=2), random(V, D, seed=1), labels_of_every_slice()
    table, expected = table_with(weight, Axis("tp")), dense_loss(x, weight, labels)
    table.weight.requires_grad_(frozen != "weight")
    x.requires_grad_(frozen != "x")
    (UPSTREAM * table.loss(x, labels)[0]).backward()
    if frozen == "x":
        assert_equal("weight.grad", table.weight.grad[:V], expected["weight.grad"])  # type: ignore
    else:
        assert_equal("x.grad", x.grad, expected["x.grad"])  # type: ignore[arg-type]


def test_logits_beyond_what_an_exponential_holds_are_taken() -> None:
    x, weight, labels = random(B, T, D, seed=2), 500 * random(V, D, seed=1), labels_of_every_slice()
    expected, found = (
        dense_loss(x, weight, labels),
        our_loss(table_with(weight, Axis("tp")), x, labels),
    )
    assert expected["losses"].max() > 1000
    for name in ("mean", "losses", "x.grad"):
        assert_equal(name, found[name], expected[name])


def check_groups_apart() -> None:
    context = init_parallel(ParallelConfig(tp_size=2))
    weight = random(V, D, seed=1) * (1, 1000)[context.dp.rank]
    x, labels = random(B, T, D, seed=2), labels_of_every_slice()
    expected, found = (
        dense_loss(x, weight, labels),
        our_loss(table_with(weight, context.tp), x, labels),
    )
    for name in ("mean", "losses", "x.grad"):
        assert_equal(name, found[name], expected[name])


def test_the_largest_logit_is_that_of_the_group_s_own_tokens() -> None:
    run_ranks(4, check_groups_apart)


def test_a_second_backward_is_refused_for_the_gradient_has_been_scaled() -> None:
    table, x = table_with(random(V, D, seed=1), Axis("tp")), random(B, T, D, seed=2)
    mean, _ = table.loss(x.requires_grad_(), labels_of_every_slice())
    mean.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mean.backward()


class WholeCrossEntropy(torch.autograd.Function):
    """The loss from all logits at once, as it is without chunks: the other side of the memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        softmax = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        softmax -= softmax.amax(-1)[..., None]
        target = softmax.gather(-1, labels[..., None])[..., 0]
        total = softmax.exp_().sum(-1)
        ctx.save_for_backward(softmax.div_(total[..., None]), labels)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        softmax, labels = ctx.saved_tensors
        result = softmax * gradient[..., None]
        result.scatter_add_(-1, labels[..., None], -gradient[..., None])
        return result.to(ctx.dtype), None


def whole_loss(table: VocabParallelEmbedding, x: Tensor, labels: Tensor) -> Tensor:
    losses = WholeCrossEntropy.apply(F.linear(x, table.weight), labels)
    mean: Tensor = losses.mean()
    return mean


def chunked_loss(table: VocabParallelEmbedding, x: Tensor, labels: Tensor) -> Tensor:
    return table.loss(x, labels)[0]


def bytes_of_all_logits(N: int, D: int, V: int, e: int = 4) -> int:
    """Logits, and softmax from which their gradient is made; then the products."""
    w = max(e, 4)
    if e == w:
        return 2 * N * V * w + 4 * N * w  # forward, while both are there
    # Backward: softmax, its gradient, and that in the product's dtype; the copies for products.
    return N * V * (2 * w + e) + (N + V) * D * e + N * w + 2 * w


def test_of_a_table_that_is_not_trained_no_gradient_is_made() -> None:
    """Which would be as large as the table; the loss and the input's gradient are the same."""
    labels, found = torch.arange(30).view(2, -1), []
    for trained in (True, False):
        table = table_with(random(1000, 64, seed=1), Axis("tp"))
        table.weight.requires_grad_(trained)
        x = random(2, 15, 64, seed=2).requires_grad_()
        with Peak(table.weight, x, labels) as peak:
            loss = table.loss(x, labels)[0]
            loss.backward()
        assert x.grad is not None
        found.append((loss.item(), x.grad, peak.bytes))
        assert (table.weight.grad is not None) == trained
    (both, expected, most), (alone, gradient, least) = found
    assert alone == both
    assert torch.equal(gradient, expected)
    assert most - least == table.weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_gpt2_s_vocabulary_the_peak_falls_by_the_closed_form(dtype: torch.dtype) -> None:
    N, width, vocabulary, peaks = 400, 64, 50304, []
    labels = torch.arange(N).view(2, -1) * 125
    for function in (whole_loss, chunked_loss):
        table = table_with(random(vocabulary, width, seed=1, dtype=torch.float32), Axis("tp"))
        x = random(2, N // 2, width, seed=2, dtype=torch.float32).requires_grad_()
        with Peak(table.weight, x, labels) as peak:
            with autocast_for(dtype, x.device)():
                loss = function(table, x, labels)
            loss.backward()
        peaks.append(peak.bytes)
    sizes = (N, width, vocabulary, dtype.itemsize)
    assert peaks == [bytes_of_all_logits(*sizes), bytes_in_chunks(*sizes)]
    assert peaks[0] - peaks[1] > 0.6 * peaks[0]


def test_evaluation_holds_one_chunk_and_makes_no_gradient() -> None:
    N, width, vocabulary = 400, 16, 50304
    table = table_with(random(vocabulary, width, seed=1, dtype=torch.float32), Axis("tp"))
    x = random(1, N, width, seed=2, dtype=torch.float32)
    labels = torch.arange(N)[None]
    with torch.no_grad(), Peak(table.weight, x, labels) as peak:
        table.loss(x, labels)
    assert peak.bytes < vocab_parallel.CHUNK_BYTES["cpu"] + 60 * N
