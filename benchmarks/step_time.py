"""Tokens/s and the fraction of this machine's matmul peak: one process, and tp 2.

python benchmarks/step_time.py

The same model and the same work on both sides, in turn: one process with two threads, then two
tensor-parallel ranks with one thread each. The peak is measured in the same run: one process, two
threads, a square product in the same dtype.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rosetrainer.config import GPTConfig
from rosetrainer.fields import Count, check_fields
from rosetrainer.flags import parse_flags
from rosetrainer.rank import run_rank


@dataclass(frozen=True)
class Bench:
    """Measures the time of a training step in two layouts."""

    model: GPTConfig = field(
        default_factory=lambda: GPTConfig(n_layers=4, d_model=768, n_heads=12, context_length=512)
    )
    batch_size: Count = 4
    """Sequences of a step."""
    steps: Count = 5
    """Steps timed in one round, after one that is not."""
    rounds: Count = 5
    """Rounds of each layout, in turn."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast; auto takes it where the hardware multiplies it."""


def measure(bench: Bench) -> None:
    """One rank of one round: rank 0 prints its seconds a step and its matmul rate as JSON."""
    import torch

    from rosetrainer.clip import clip_gradients
    from rosetrainer.config import OptimConfig
    from rosetrainer.data_parallel import accumulate_gradients
    from rosetrainer.model import GPTModel
    from rosetrainer.optim import build_optimizer
    from rosetrainer.parallel_context import init_tensor_parallel
    from rosetrainer.performance import choose_dtype, flops_per_token, matmul_peak
    from rosetrainer.precision import autocast_for
    from rosetrainer.tensor_parallel import init_weights

    context = init_tensor_parallel(device="cpu")
    dtype = choose_dtype(bench.dtype, context.device)
    model = GPTModel(bench.model, context)
    init_weights(model, seed=1)
    optimizer = build_optimizer(model, OptimConfig())
    shape = (bench.batch_size, bench.model.context_length)
    generator = torch.Generator().manual_seed(1)
    input_ids, labels = torch.randint(bench.model.vocab_size, (2, *shape), generator=generator)
    seconds = []
    for _ in range(bench.steps + 1):
        started = time.perf_counter()
        autocast = autocast_for(dtype, context.device)
        accumulate_gradients(model, [(input_ids, labels)], context, autocast)
        clip_gradients(model, context.tp, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    if context.rank == 0:
        peak = matmul_peak(context.device, dtype, seconds=1.0) if context.world_size == 1 else 0
        figures = {
            "seconds": statistics.median(seconds[1:]),
            "peak": peak,
            "dtype": str(dtype).removeprefix("torch."),
            "flops": flops_per_token(bench.model) * bench.batch_size * shape[1],
        }
        print(json.dumps(figures), flush=True)
    if context.world_size > 1:
        torch.distributed.destroy_process_group()


def one_round(ranks: int, threads: int, argv: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--round", *argv]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command[1:1] = torchrun
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(figures, dict)
    return figures


def main(argv: list[str]) -> None:
    rank = argv[:1] == ["--round"]
    flags = argv[rank:]
    bench = parse_flags(Bench, flags, "python benchmarks/step_time.py")
    check_fields(bench)
    bench.model.check(tp_size=2)
    if rank:
        measure(bench)
        return
    import torch

    layouts = {"one process, 2 threads": (1, 2), "tp 2, 1 thread each": (2, 1)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in layouts}
    for _ in range(bench.rounds):
        for name, (ranks, threads) in layouts.items():
            rounds[name].append(one_round(ranks, threads, flags))
    peak = max(figures["peak"] for group in rounds.values() for figures in group)
    first = rounds["one process, 2 threads"][0]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{first['dtype']}, matmul peak {peak / 1e9:.0f} GFLOP/s with 2 threads"
    )
    print(f"{bench.model}, batch {bench.batch_size}; medians of {bench.rounds} rounds, in turn")
    tokens = bench.batch_size * bench.model.context_length
    medians = {}
    for name, group in rounds.items():
        medians[name] = statistics.median(figures["seconds"] for figures in group)
        rate = first["flops"] / medians[name]
        print(
            f"  {name:24} {medians[name] * 1e3:7.0f} ms a step  {tokens / medians[name]:8,.0f} "
            f"tokens/s  {rate / 1e9:6.0f} GFLOP/s  {rate / peak:5.1%} of the peak"
        )
    alone, parallel = medians.values()
    print(f"  tp 2 reaches {alone / parallel:.2f} of one process")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
