"""The sizes of benchmarks/gpu.py: a GPU's, and tiny ones that show on a CPU that it works."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.families import LLAMA
from rosetrainer.config import GPTConfig

VOCABULARY = 50257  # ours pads it to 50304 by itself, the plain model is given those rows


@dataclass(frozen=True)
class Shapes:
    """The sizes of one kind of machine."""

    large: GPTConfig
    micro_batches: tuple[int, ...]
    """Sequences; the first that fits is measured."""
    small: GPTConfig
    batch: int
    llama: GPTConfig
    llama_batches: tuple[int, ...]
    """As micro_batches, for two models in one memory."""
    squares: tuple[int, ...]
    """Sides of the square products among which the best rate is looked for."""
    seconds_of_products: float
    steps: int
    """In a round, after a first one that is not timed."""
    rounds: int
    backend: str
    """torch.compile's. On a CPU its C++ would take minutes to compile and show nothing of a GPU."""


ON_GPU = Shapes(
    large=GPTConfig(VOCABULARY, context_length=1024, n_layers=48, n_heads=25, d_model=1600),
    micro_batches=(32, 24, 16, 8, 4),
    small=GPTConfig(VOCABULARY, context_length=1024, n_layers=12, n_heads=12, d_model=768),
    batch=32,
    # Of Llama 3.2 1B.
    llama=GPTConfig(
        *(128256, 2048),
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        d_model=2048,
        d_ff=8192,
        rotary_base=500000.0,
        **LLAMA | {"tied": True},
    ),
    llama_batches=(4, 2, 1),
    squares=(8192, 16384),
    seconds_of_products=3.0,
    steps=10,
    rounds=7,
    backend="inductor",
)
TINY = Shapes(
    large=GPTConfig(250, context_length=32, n_layers=3, n_heads=5, d_model=40),
    micro_batches=(4, 2),
    small=GPTConfig(250, context_length=32, n_layers=2, n_heads=4, d_model=32),
    batch=4,
    llama=GPTConfig(250, 32, 2, 4, 32, d_ff=96, n_kv_heads=2, **LLAMA | {"tied": True}),
    llama_batches=(4, 2),
    squares=(256, 512),
    seconds_of_products=0.2,
    steps=2,
    rounds=5,
    backend="aot_eager",
)
