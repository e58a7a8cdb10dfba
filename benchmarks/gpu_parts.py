"""What benchmarks/gpu.py measures, each part in a process of its own, a JSON object a line.

python benchmarks/gpu_parts.py large|pair SECONDS

A line stands as soon as it is measured: who cuts a part short keeps what came before.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.baseline_recipe import plain_optimizer
from benchmarks.our_step import SameBatch
from benchmarks.plain_step import CLIP, RATE, plain_model
from benchmarks.work import Work
from rosetrainer.config import GPTConfig, OptimConfig, TrainConfig
from rosetrainer.hardware.block_compile import compile_blocks, compiles
from rosetrainer.hardware.performance import flops_per_token
from rosetrainer.models.build import build_model
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.training.trainer import train_step

VOCABULARY = 50257  # ours pads it to 50304 by itself, the plain model is given those rows


@dataclass(frozen=True)
class Shapes:
    """The sizes of one kind of machine."""

    large: GPTConfig
    micro_batches: tuple[int, ...]
    """Sequences; the first that fits is measured."""
    small: GPTConfig
    batch: int
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
    squares=(256, 512),
    seconds_of_products=0.2,
    steps=2,
    rounds=5,
    backend="aot_eager",
)


@lru_cache
def same_batch(model: GPTConfig, rows: int) -> SameBatch:
    """So many random sequences on the host, in every step."""
    return SameBatch(Work(model, batch_size=rows))


def our_step(model_config: GPTConfig, shapes: Shapes, device: torch.device) -> Callable[[int], Any]:
    """A step of so many sequences, out of what `train` sets up."""
    context, config = ParallelContext(device=device), TrainConfig(model_config)
    model = build_model(model_config, context)
    init_weights(model, seed=1)
    if compiles(config, 1, device)[0] or device.type == "cpu":
        compile_blocks(model.blocks, shapes.backend)
    optimizer = build_optimizer(model, config.optim)
    autocast = autocast_for(torch.bfloat16, device)

    def step(rows: int) -> None:
        run = TrainConfig(model_config, optim=OptimConfig(global_batch_size=rows))
        corpus = same_batch(model_config, rows)
        try:
            train_step(run, corpus, model, optimizer, context, autocast, 0)
        except torch.OutOfMemoryError:  # the next one should find the memory as it was
            optimizer.zero_grad()
            optimizer.state.clear()
            raise

    return step


def plain_step(config: GPTConfig, shapes: Shapes, device: torch.device) -> Callable[[int], Any]:
    """The same by the plain recipe: one file, torch's AdamW, the whole model compiled."""
    padded = replace(config, vocab_size=config.vocab_size + -config.vocab_size % 128)
    model = plain_model(padded).to(device)
    optimizer = plain_optimizer(model, RATE)
    compiled = torch.compile(model, dynamic=False, backend=shapes.backend)

    def step(rows: int) -> None:
        ids, labels = (
            torch.from_numpy(array).to(device)
            for array in same_batch(config, rows).train_batch(1, 0, rows, range(rows))
        )
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one, until the device has done so many."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        action()
    wait_for(device)
    return (time.perf_counter() - started) / times


def product_rate(shapes: Shapes, device: torch.device) -> float:
    """FLOP/s of the best large bf16 product, out of all that fit into the time."""
    best = 0.0
    for n in shapes.squares:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        result = a @ b
        end = time.perf_counter() + shapes.seconds_of_products
        while time.perf_counter() < end:
            seconds = timed(partial(torch.mm, a, b, out=result), device)
            best = max(best, 2 * n**3 / seconds)
    return best


def rounds_of(
    sides: dict[str, Callable[[int], Any]],
    rows: int,
    config: GPTConfig,
    shapes: Shapes,
    device: torch.device,
    end: float,
) -> None:
    """Prints the figures of each side's rounds, in turn, until they are done or time is up."""
    for name, step in sides.items():  # compile, allocate, choose kernels
        tell(side=name, first_steps_seconds=3 * timed(partial(step, rows), device, 3))
    tokens = rows * config.context_length
    for number in range(shapes.rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            seconds = timed(partial(sides[name], rows), device, shapes.steps)
            flops = flops_per_token(config) * tokens / seconds
            tell(side=name, seconds=seconds, tokens_per_second=tokens / seconds, flops=flops)
        if time.monotonic() > end:
            break


def large(shapes: Shapes, device: torch.device, end: float) -> None:
    """The largest model that one card trains, with as many sequences as fit."""
    step = our_step(shapes.large, shapes, device)
    for rows in shapes.micro_batches:
        try:
            step(rows)
            step(rows)  # beside Adam's moments, which the first one makes at its end
        except torch.OutOfMemoryError:
            tell(too_large=rows)
        else:
            break
        gc.collect()
        torch.cuda.empty_cache()
    else:
        sys.exit(f"error: no micro-batch of {shapes.micro_batches} fits")
    tell(micro_batch=rows)
    rounds_of({"ours": step}, rows, shapes.large, shapes, device, end)
    if device.type == "cuda":
        tell(peak_bytes=torch.cuda.max_memory_allocated(device))


def pair(shapes: Shapes, device: torch.device, end: float) -> None:
    """The small model, ours and the plain recipe."""
    make = {"ours": our_step, "plain": plain_step}
    sides = {name: build(shapes.small, shapes, device) for name, build in make.items()}
    rounds_of(sides, shapes.batch, shapes.small, shapes, device, end)


def tell(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def main(argv: Sequence[str]) -> None:
    part, seconds = argv
    end = time.monotonic() + float(seconds)
    on_gpu = torch.cuda.is_available()
    device, shapes = (torch.device("cuda", 0), ON_GPU) if on_gpu else (torch.device("cpu"), TINY)
    card = torch.cuda.get_device_name(device) if on_gpu else ""
    tell(card=card, flops_of_product=product_rate(shapes, device))
    {"large": large, "pair": pair}[part](shapes, device, end)


if __name__ == "__main__":
    main(sys.argv[1:])
