"""What benchmarks/gpu.py measures, each part in a process of its own, a JSON object a line.

python benchmarks/gpu_parts.py large|pair|llama SECONDS

A line stands as soon as it is measured: who cuts a part short keeps what came before.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.baseline_recipe import plain_optimizer
from benchmarks.families import HuggingFaceLlama
from benchmarks.gpu_shapes import ON_GPU, TINY, Shapes
from benchmarks.our_step import SameBatch
from benchmarks.plain_step import CLIP, RATE, plain_model
from benchmarks.work import Work
from rosetrainer.config import GPTConfig, OptimConfig, TrainConfig
from rosetrainer.hardware.block_compile import compile_blocks, compiles
from rosetrainer.model_flops import flops_per_token
from rosetrainer.models.build import build_model
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.training.trainer import train_step


class Trained(NamedTuple):
    """A model that is trained, by a step of so many sequences."""

    step: Callable[[int], object]
    optimizer: AdamW | torch.optim.Optimizer


@lru_cache
def same_batch(model: GPTConfig, rows: int) -> SameBatch:
    """So many random sequences on the host, in every step."""
    return SameBatch(Work(model, batch_size=rows))


def ours(config: GPTConfig, shapes: Shapes, device: torch.device) -> Trained:
    """Out of what `train` sets up."""
    context, settings = ParallelContext(device=device), TrainConfig(config)
    model = build_model(config, context)
    init_weights(model, seed=1)
    if compiles(settings, 1, device)[0] or device.type == "cpu":
        compile_blocks(model.blocks, shapes.backend)
    optimizer = build_optimizer(model, settings.optim)
    autocast = autocast_for(torch.bfloat16, device)

    def step(rows: int) -> None:
        run = TrainConfig(config, optim=OptimConfig(global_batch_size=rows))
        train_step(run, same_batch(config, rows), model, optimizer, context, autocast, 0)

    return Trained(step, optimizer)


def by_plain_recipe(
    model: nn.Module, config: GPTConfig, shapes: Shapes, device: torch.device
) -> Trained:
    """(ids, labels) -> loss by the plain recipe: torch's AdamW, the whole model compiled."""
    model = model.to(device)
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

    return Trained(step, optimizer)


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


def rows_that_fit(sides: Sequence[Trained], candidates: Sequence[int]) -> int:
    """The first of these numbers of sequences with which all sides can be trained in turn."""
    for rows in candidates:
        try:
            for _ in range(2):  # beside Adam's moments, which the first steps make at their ends
                for side in sides:
                    side.step(rows)
        except torch.OutOfMemoryError:
            tell(too_large=rows)
        else:
            tell(micro_batch=rows)
            return rows
        for side in sides:  # the next number should find the memory as it was
            side.optimizer.zero_grad()
            side.optimizer.state.clear()
        gc.collect()
        torch.cuda.empty_cache()
    sys.exit(f"error: no micro-batch of {candidates} fits")


def rounds_of(
    sides: dict[str, Trained],
    rows: int,
    config: GPTConfig,
    shapes: Shapes,
    device: torch.device,
    end: float,
) -> None:
    """Prints the figures of each side's rounds, in turn, until they are done or time is up."""
    for name, side in sides.items():  # compile, allocate, choose kernels
        tell(side=name, first_steps_seconds=3 * timed(partial(side.step, rows), device, 3))
    tokens = rows * config.context_length
    for number in range(shapes.rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            seconds = timed(partial(sides[name].step, rows), device, shapes.steps)
            flops = flops_per_token(config) * tokens / seconds
            tell(side=name, seconds=seconds, tokens_per_second=tokens / seconds, flops=flops)
        if time.monotonic() > end:
            break


def large(shapes: Shapes, device: torch.device, end: float) -> None:
    """The largest model that one card trains, with as many sequences as fit."""
    side = ours(shapes.large, shapes, device)
    rows = rows_that_fit([side], shapes.micro_batches)
    rounds_of({"ours": side}, rows, shapes.large, shapes, device, end)
    if device.type == "cuda":
        tell(peak_bytes=torch.cuda.max_memory_allocated(device))


def pair(shapes: Shapes, device: torch.device, end: float) -> None:
    """The small model, ours and in one file."""
    config = shapes.small
    padded = replace(config, vocab_size=config.vocab_size + -config.vocab_size % 128)
    plain = by_plain_recipe(plain_model(padded), config, shapes, device)
    sides = {"ours": ours(config, shapes, device), "theirs": plain}
    rounds_of(sides, shapes.batch, config, shapes, device, end)


def llama(shapes: Shapes, device: torch.device, end: float) -> None:
    """A Llama, ours and transformers' own."""
    if find_spec("transformers") is None:
        sys.exit("error: no transformers here to train beside: pip install -r requirements-dev.txt")
    theirs = by_plain_recipe(HuggingFaceLlama(shapes.llama), shapes.llama, shapes, device)
    sides = {"ours": ours(shapes.llama, shapes, device), "theirs": theirs}
    rows = rows_that_fit(list(sides.values()), shapes.llama_batches)
    rounds_of(sides, rows, shapes.llama, shapes, device, end)


def tell(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def main(argv: Sequence[str]) -> None:
    part, seconds = argv
    end = time.monotonic() + float(seconds)
    on_gpu = torch.cuda.is_available()
    device, shapes = (torch.device("cuda", 0), ON_GPU) if on_gpu else (torch.device("cpu"), TINY)
    card = torch.cuda.get_device_name(device) if on_gpu else ""
    tell(card=card, flops_of_product=product_rate(shapes, device))
    {"large": large, "pair": pair, "llama": llama}[part](shapes, device, end)


if __name__ == "__main__":
    main(sys.argv[1:])
