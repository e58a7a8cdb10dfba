"""How fast this machine computes a block's products in one way and in another: half a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from rosetrainer.hardware import attention_blocks, onednn

B, T, H, K = 2, 256, 8, 64  # batch, sequence, heads and their width
MATRICES = 12  # of (D, D) numbers, in a block of a GPT
SECONDS, ROUNDS = 0.6, 9  # whichever comes first ends it

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratios:
    """Times, each in parts of that of torch's own kernels in fp32."""

    bf16: float
    """A block in bf16, of the best fp32 block's; both with their backward passes."""
    linear: float = 1.0
    """A product and the gradient of its input by oneDNN."""
    sums: float = 1.0
    """The gradient of a weight by oneDNN."""


def measure() -> Ratios:
    """With the threads that this process has; takes turns, so that all see the machine alike."""
    works = works_of_a_block()
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + SECONDS
    for done in range(ROUNDS):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
        if done and time.perf_counter() > end:
            break
    # The first round chooses kernels and takes memory.
    return ratios({name: median(found[1:]) for name, found in times.items()})


def ratios(times: Mapping[str, float]) -> Ratios:
    """times: seconds of each of works_of_a_block."""
    linear, sums = (
        times.get(f"{work} by oneDNN", times[work]) / times[work] for work in ("linear", "sums")
    )
    products = times["linear"] * min(linear, 1) + times["sums"] * min(sums, 1)
    fp32 = MATRICES * products + times["attention"]
    bf16 = MATRICES * times["products in bf16"] + times["attention in bf16"]
    return Ratios(bf16 / fp32, linear, sums)


def works_of_a_block() -> dict[str, Work]:
    """One (D, D) matrix's products and one attention, in each way."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    x, upstream, weight = draw(B * T, H * K), draw(B * T, H * K), draw(H * K, H * K)
    narrow = (x.bfloat16(), upstream.bfloat16(), weight.bfloat16())
    heads = [draw(B, H, T, K) for _ in range(4)]
    works: dict[str, Work] = {
        "linear": partial(linear, onednn.TORCHS_LINEAR, x, upstream, weight),
        "sums": partial(onednn.TORCHS_MM, upstream.T, x),
        "products in bf16": partial(products, *narrow),
        "attention": partial(attend, heads),
        "attention in bf16": partial(attend, [one.bfloat16() for one in heads]),
    }
    if torch.backends.mkldnn.is_available():
        works["linear by oneDNN"] = partial(linear, onednn.product, x, upstream, weight)
        works["sums by oneDNN"] = partial(onednn.product, upstream.T, x.T)
    return works


def linear(product: Callable[..., Tensor], x: Tensor, upstream: Tensor, weight: Tensor) -> None:
    """x Wᵀ and the gradient of x, (B T, D) each."""
    product(x, weight)
    product(upstream, weight.T)


def products(x: Tensor, upstream: Tensor, weight: Tensor) -> None:
    """All three of a linear layer, by torch's kernels."""
    linear(onednn.TORCHS_LINEAR, x, upstream, weight)
    onednn.TORCHS_MM(upstream.T, x)


def attend(heads: list[Tensor]) -> None:
    """Causal attention, by the kernel that training takes for the dtype, and its gradients."""
    upstream, *inputs = heads
    with torch.enable_grad():
        inputs = [one.detach().requires_grad_() for one in inputs]
        query, key, value = inputs
        found = attention_blocks.attention(query, key, value, None, is_causal=True)
        torch.autograd.grad(found, inputs, upstream)
