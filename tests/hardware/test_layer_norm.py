"""Layer norm by plain kernels, against the formula in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lattice import saved_by
from torch import Tensor

from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.hardware.layer_norm import layer_norm

EPS = 1e-5


def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    y = (x - mean) / (variance + EPS) ** 0.5
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("parts", ["none", "weight", "both", "frozen"])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 9), (2, 3, 2, 33)])
def test_it_equals_the_formula_in_float64(parts: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 2 + 3 * torch.randn(*shape, generator=generator)
    x[0] = 0.25  # no variance, but for eps
    x = x.transpose(0, 1) if len(shape) == 4 else x  # not contiguous
    weight = torch.randn(shape[-1], generator=generator) if parts != "none" else None
    bias = torch.randn(shape[-1], generator=generator) if parts == "both" else None
    upstream = torch.randn(x.shape, generator=generator)
    trained = [t for t in (x, weight, bias) if t is not None and not (parts == "frozen" and t is x)]
    found = []
    for dtype in (torch.float64, torch.float32):
        of = {id(t): t.to(dtype).requires_grad_() for t in trained}
        inputs = [None if t is None else of.get(id(t), t.to(dtype)) for t in (x, weight, bias)]
        if dtype == torch.float64:
            y = formula(*inputs)  # type: ignore[arg-type]
        else:
            assert inputs[0] is not None
            with fast_kernels(dtype, torch.device("cpu")):
                assert F.layer_norm is layer_norm
                y = F.layer_norm(inputs[0], shape[-1:], inputs[1], inputs[2], EPS)
            assert "_LayerNorm" in type(y.grad_fn).__name__
        y.backward(upstream.to(dtype))
        found.append([y.detach(), *(leaf.grad for leaf in of.values())])
    for exact, ours in zip(*found, strict=True):
        assert exact is not None and ours is not None
        scale = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_and_shapes_are_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8).to(dtype)
    assert layer_norm(x, (8,)).equal(F.layer_norm(x, (8,)))
    wide = torch.randn(4, 2, 8)
    assert layer_norm(wide, (2, 8)).equal(F.layer_norm(wide, (2, 8)))
    assert layer_norm(wide[:0], (8,)).shape == (0, 2, 8)


def test_it_keeps_what_torchs_keeps() -> None:
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    kept = [saved_by(partial(norm, x, (32,), weight)) for norm in (layer_norm, F.layer_norm)]
    assert sorted(kept[0].values()) == sorted(kept[1].values())
