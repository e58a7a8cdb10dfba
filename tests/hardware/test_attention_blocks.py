"""Causal attention in blocks of queries, against the textbook's formula in float64.

In bf16 each number is rounded to 8 significant bits, by at most U of itself; from that alone
follows how far a result may be off.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lattice import saved_by
from oracle import assert_equal
from torch import Tensor

from rosetrainer.hardware.attention_blocks import BLOCK, MAX_SAVED_QUERIES, CausalBlocks
from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.models.attention import attend
from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.dropout import Dropout
from rosetrainer.planner.attention import bytes_of_scores

U = 2.0**-8
B, H, K = 2, 3, 16
LENGTHS = [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 44]
LENGTHS += [MAX_SAVED_QUERIES, MAX_SAVED_QUERIES + 1]
NAMES = ("heads", "query's gradient", "key's gradient", "value's gradient")


def random_inputs(T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fused projection (B, T, 3, H, K), and an upstream gradient (B, H, T, K)."""
    generator = torch.Generator().manual_seed(T)
    fused = torch.randn(B, T, 3, H, K, generator=generator, dtype=torch.float64)
    upstream = torch.randn(B, T, H, K, generator=generator, dtype=torch.float64).transpose(1, 2)
    return fused.to(dtype), upstream.to(dtype)


def results(function: object, fused: Tensor, upstream: Tensor) -> list[Tensor]:
    """[heads, and the gradients of query, key and value], (B, H, T, K) each."""
    leaf = fused.clone().requires_grad_()
    heads = function(*leaf.permute(2, 0, 3, 1, 4))  # type: ignore[operator]
    heads.backward(upstream)
    assert leaf.grad is not None
    return [heads.detach(), *leaf.grad.permute(2, 0, 3, 1, 4)]


def naive_probabilities(query: Tensor, key: Tensor) -> Tensor:
    T = query.shape[2]
    scores = torch.einsum("bhtk,bhsk->bhts", query, key) / math.sqrt(K)
    later = torch.arange(T)[None, :] > torch.arange(T)[:, None]
    powers = scores.exp() * ~later
    return powers / powers.sum(-1, keepdim=True)


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return naive_probabilities(query, key) @ value


def fused_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("T", LENGTHS)
def test_blocks_equal_the_formula_in_float64(T: int) -> None:
    inputs = random_inputs(T, torch.float64)
    ours, exact = results(CausalBlocks.apply, *inputs), results(naive, *inputs)
    for name, our, dense in zip(NAMES, ours, exact, strict=True):
        largest = max(t.abs().max().item() for t in exact) if T == 1 else None
        assert_equal(name, our, dense, largest)  # one key: the scores' gradients are zeros
    assert ours[0].transpose(1, 2).is_contiguous(), "the next layer reads it without a copy"


def bounds(fused: Tensor, upstream: Tensor, exact: list[Tensor]) -> list[Tensor]:
    """How far each number of the four results may be off in bf16, sums being exact.

    A score is off by U of itself, so a probability by a factor within 1 + d, its own rounding
    included.
    """
    query, key, value = fused.permute(2, 0, 3, 1, 4)
    p = naive_probabilities(query, key)
    scores = (query @ key.mT).abs().max() / math.sqrt(K)
    d = (2 * U * scores).exp() * (1 + U) - 1
    of_p = (upstream @ value.mT).abs() * p.ne(0)
    # Of p (x - sum p x): p, x and the sum are off, and the result is rounded.
    off = p * of_p.amax(-1, keepdim=True) * (2 * (d + U) * (1 + d) + 2 * (d + U))
    sums = [
        d * (p @ value.abs()),
        off @ key.abs() / math.sqrt(K),
        off.mT @ query.abs() / math.sqrt(K),
        d * (p.mT @ upstream.abs()),
    ]
    return [s + U * (t.abs() + s) + 1e-6 for s, t in zip(sums, exact, strict=True)]


@pytest.mark.parametrize("T", LENGTHS)
def test_blocks_in_bf16_are_off_by_no_more_than_their_roundings(T: int) -> None:
    short = random_inputs(T, torch.bfloat16)
    fused, upstream = (t.double() for t in short)
    exact = results(naive, fused, upstream)
    allowed = bounds(fused, upstream, exact)
    ours, kernel = results(CausalBlocks.apply, *short), results(fused_kernel, *short)
    for name, our, sdpa, dense, bound in zip(NAMES, ours, kernel, exact, allowed, strict=True):
        assert our.dtype == torch.bfloat16
        error, their_error = ((t.double() - dense).abs() for t in (our, sdpa))
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"
        typical, theirs = (e.square().mean().sqrt() for e in (error, their_error))
        assert typical <= 2.5 * theirs + 1e-6, f"{name}: {typical:.2e}, SDPA {theirs:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_blocks_are_used_in_bf16_without_a_mask_alone(
    dtype: torch.dtype, masked: bool, enabled: bool
) -> None:
    fused, _ = random_inputs(BLOCK + 3, dtype)
    query, key, value = fused.permute(2, 0, 3, 1, 4)
    mask = torch.ones(BLOCK + 3, BLOCK + 3, dtype=torch.bool).tril() if masked else None
    kernel = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not masked)
    short = enabled and dtype == torch.bfloat16 and not masked
    expected = CausalBlocks.apply(query, key, value) if short else kernel
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    wanted = "auto" if enabled else "torch"
    with fast_kernels(torch.bfloat16, torch.device("cpu"), wanted), autocast:
        found = attend(query, key, value, mask, Dropout(0.1), None, Axis("tp"))
    assert torch.equal(found, expected)
    assert found.dtype == dtype


@pytest.mark.parametrize("T", LENGTHS)
def test_the_probabilities_that_are_saved_are_those_predicted(T: int) -> None:
    fused, _ = random_inputs(T, torch.bfloat16)
    q, k, v = (part.transpose(1, 2) for part in fused.requires_grad_().unbind(2))
    with fast_kernels(torch.bfloat16, torch.device("cpu")):
        saved = saved_by(lambda: attend(q, k, v, None, Dropout(0.0), None, Axis("tp")))
    assert sum(saved.values()) - fused.nbytes == bytes_of_scores(B, H, T, T, e=2)
