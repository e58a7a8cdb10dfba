"""fp32 products by oneDNN: the same numbers as F.linear's, taken where they are meant to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from machine import like
from oracle import random_batch, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rosetrainer.hardware import measured, onednn
from rosetrainer.hardware.kernels import choose_kernels, fast_kernels
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel import overlap, vocab_parallel
from rosetrainer.parallel.comm import Pending
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.overlap import column_linear
from rosetrainer.parallel.pipeline.split_backward import WeightGradients, _SplitLinear
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.parallel.vocab_parallel import linear_cross_entropy
from rosetrainer.training.step import compute_gradients

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def avx512(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether oneDNN is faster at sums too, as with AVX512 on a processor of AMD's."""
    monkeypatch.setattr(measured, "machine", lambda: like(linear=True, sums=request.param))
    return bool(request.param)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "machine", lambda: like(linear=True))


class Operators(TorchDispatchMode):
    """The names of all that runs, backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def of_onednn(self) -> int:
        return self.names.count("mkldnn._linear_pointwise.default")


def value_and_gradients(upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = F.linear(*leaves)
    y.backward(upstream)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1,), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_rounded_and_no_more(
    avx512: bool, shape: tuple[int, ...], bias: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    n_in, n_out = 33, 20
    sizes = [(*shape, n_in), (n_out, n_in), *([(n_out,)] if bias else [])]
    inputs = [torch.randn(size, generator=generator) for size in sizes]
    upstream = torch.randn(*shape, n_out, generator=generator)
    with fast_kernels(torch.float32, CPU), Operators() as seen:
        ours = value_and_gradients(upstream, *inputs)
    assert seen.of_onednn() == (3 if avx512 and shape != (0,) else 2)
    exact = value_and_gradients(upstream.double(), *(tensor.double() for tensor in inputs))
    # A sum of n products is wrong by at most n roundings of the sum without signs.
    magnitudes = value_and_gradients(upstream.double().abs(), *(t.double().abs() for t in inputs))
    n = max(n_in, n_out, upstream.shape[:-1].numel()) + 1
    for mine, truth, magnitude in zip(ours, exact, magnitudes, strict=True):
        assert ((mine - truth).abs() <= n * 2**-24 * magnitude).all()


def test_a_view_that_is_not_contiguous_is_read_as_it_is(amd: None) -> None:
    x, weight = torch.randn(4, 6, 5).transpose(0, 1), torch.randn(5, 3).T
    with fast_kernels(torch.float32, CPU), Operators() as seen:
        found = F.linear(x, weight)
    assert seen.of_onednn() == 1
    assert torch.allclose(found, F.linear(x, weight), rtol=1e-5, atol=1e-5)


def head_gradients(table: Tensor, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss of a table as output head, and its gradients."""
    x, table = (tensor.detach().clone().requires_grad_() for tensor in (x, table))
    weights = torch.full(labels.shape, 1 / labels.numel(), dtype=table.dtype)
    loss, _ = linear_cross_entropy(x, table, labels, weights, len(table), Axis("tp"))
    loss.backward()
    assert x.grad is not None and table.grad is not None
    return [loss.detach(), x.grad, table.grad]


def test_the_head_s_products_run_there_in_every_chunk(
    avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    V, D, chunks = 5000, 24, 3  # rows of a sum: 2048, 2048, 904
    monkeypatch.setitem(vocab_parallel.CHUNK_BYTES, "cpu", 4 * V * 4)  # 4 + 4 + 2 tokens
    generator = torch.Generator().manual_seed(1)
    table, x = (torch.randn(size, generator=generator) for size in ((V, D), (2, 5, D)))
    labels = torch.randint(V, (2, 5), generator=generator)
    with fast_kernels(torch.float32, CPU), Operators() as seen:
        ours = head_gradients(table, x, labels)
    assert seen.of_onednn() == chunks * (5 if avx512 else 1)
    exact = head_gradients(table.double(), x.double(), labels)
    for mine, truth in zip(ours, exact, strict=True):
        assert torch.allclose(mine.double(), truth, rtol=1e-4, atol=1e-6)


def backward_of_our_own(way: str, x: Tensor, weight: Tensor) -> list[Tensor]:
    """x times a layer's weight, squared, and both gradients, without their sums over the ranks."""
    x, parameter = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    put_off = WeightGradients()
    if way == "overlap":
        y = column_linear(x, parameter, None, Axis("tp", size=2))
    else:
        y = _SplitLinear.apply(x, parameter, put_off)
    y.square().sum().backward()
    with torch.no_grad():
        for product in put_off.take():
            product()
    assert x.grad is not None and parameter.grad is not None
    return [y.detach(), x.grad, parameter.grad]


@pytest.mark.parametrize("way", ["overlap", "split"])
def test_the_products_of_a_backward_pass_of_our_own_run_there(
    avx512: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = lambda x, tp, _: Pending(None, tp.ledger, lambda: x)  # noqa: E731
    monkeypatch.setattr(overlap, "start_all_reduce", given)
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    with fast_kernels(torch.float32, CPU), Operators() as seen:
        ours = backward_of_our_own(way, x, weight)
    assert seen.of_onednn() == (3 if avx512 else 2)  # y and of x; of the weight
    for mine, exact in zip(
        ours, backward_of_our_own(way, x.double(), weight.double()), strict=True
    ):
        assert torch.allclose(mine.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["factors", "recorded", "float64"])
def test_what_ours_does_not_do_is_torchs(avx512: bool, case: str) -> None:
    dtype = torch.float64 if case == "float64" else torch.float32
    a, b, total = (torch.randn(3, 3, dtype=dtype, requires_grad=case == "recorded") for _ in "abc")
    factors = {"beta": 0.5, "alpha": 2.0} if case == "factors" else {}
    wanted = total.clone().addmm_(a, b, **factors)
    with fast_kernels(torch.float32, CPU):
        found = total.clone().addmm_(a, b, **factors)
        product = torch.mm(a, b)
    assert torch.equal(found, wanted)
    assert found.requires_grad == product.requires_grad == (case == "recorded")
    off = (product - a @ b).abs()  # each a sum of three, in an order of its own
    assert (off <= 2 * 3 * torch.finfo(torch.float32).eps / 2 * (a.abs() @ b.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(amd: None, dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    with fast_kernels(torch.float32, CPU), Operators() as seen:
        found = F.linear(x, weight)
    assert seen.of_onednn() == 0
    assert torch.equal(found, F.linear(x, weight))


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_a_model_s_products_run_there_and_it_trains_as_before(amd: None, recompute: str) -> None:
    gradients = []
    context = replace(ParallelContext(), recompute=recompute)
    batch = [(0, *random_batch(tiny_config(), 2))]
    for dtype in (torch.float64, torch.float32):  # what the context is made for, not the model
        model = GPTModel(tiny_config(), context)
        init_weights(model, seed=1)
        with fast_kernels(dtype, CPU), Operators() as seen:
            compute_gradients(model, batch, context)
        gradients.append([p.grad for p in model.parameters()])
    times = 3 if recompute == "block" else 2
    assert seen.of_onednn() >= times * 4 * tiny_config().n_layers
    for ours, torchs in zip(*gradients, strict=True):
        assert ours is not None and torchs is not None
        assert torch.allclose(ours, torchs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("linear", "sums", "dtype", "device", "expected"),
    [
        (True, True, torch.float32, "cpu", "layer_norm,linear,sums"),
        (True, False, torch.float32, "cpu", "layer_norm,linear"),
        (False, True, torch.float32, "cpu", "layer_norm,sums"),
        (False, False, torch.float32, "cpu", "layer_norm"),
        (True, True, torch.bfloat16, "cpu", "layer_norm,attention"),
        (True, True, torch.float64, "cpu", "layer_norm"),
        (True, True, torch.float32, "cuda", "torch"),
    ],
)
def test_each_is_taken_for_fp32_where_it_was_measured_as_faster(
    monkeypatch: pytest.MonkeyPatch,
    linear: bool,
    sums: bool,
    dtype: torch.dtype,
    device: str,
    expected: str,
) -> None:
    monkeypatch.setattr(measured, "machine", lambda: like(linear=linear, sums=sums))
    assert choose_kernels("auto", dtype, torch.device(device)) == expected
    before = (F.linear, torch.mm, torch.Tensor.addmm_)
    with fast_kernels(dtype, torch.device(device)):
        inside = (F.linear, torch.mm, torch.Tensor.addmm_)
        assert (inside[0] == onednn.linear) == ("linear" in expected)
        ours = (onednn.mm, onednn.addmm_) if "sums" in expected else before[1:]
        assert inside[1:] == ours
    assert (F.linear, torch.mm, torch.Tensor.addmm_) == before


def test_a_flag_or_a_run_s_record_goes_before_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured, "machine", None)  # whoever asks fails
    fp32 = torch.float32
    assert choose_kernels("torch", fp32, CPU) == "torch"
    assert choose_kernels("ours", fp32, CPU) == "layer_norm,linear,sums"
    assert choose_kernels("layer_norm,linear", fp32, CPU) == "layer_norm,linear"
    assert choose_kernels("sums,of a newer version", fp32, CPU) == "sums"
    assert choose_kernels("auto", torch.bfloat16, CPU) == "layer_norm,attention"
