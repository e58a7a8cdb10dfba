"""How fast this machine computes a block's products in one way and in another: half a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rosetrainer.hardware import attention_blocks, onednn

B, T, H, K = 1, 256, 8, 64  # batch, sequence, heads and their width
MATRICES = 12  # of (D, D) numbers, in a block of a GPT
SECONDS, LEAST, MOST = 0.5, 5, 20  # of rounds, so many at least and at most
HOPELESS = 3.0  # of fp32's time: bf16 is emulated, and another round of it would take longest

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
    """With one thread: beside other work several wait for each other, for ten times as long as they
    compute, and the more the shorter a kernel is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return best_of_rounds()
    finally:
        torch.set_num_threads(threads)


def best_of_rounds() -> Ratios:
    """In each the ways take turns; by the shortest time of each, which was disturbed least."""
    works = works_of_a_block()
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + SECONDS
    for done in range(1, MOST + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
        best = ratios({name: min(found) for name, found in times.items()})
        if done == 2 and best.bf16 > HOPELESS:  # the first round chooses kernels and takes memory
            works = {name: work for name, work in works.items() if "bf16" not in name}
        if done >= LEAST and time.perf_counter() > end:
            break
    return best


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
