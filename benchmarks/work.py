"""The work that all sides of a comparison do, the time that one takes for it, and their table.

Shape letters: B batch, T context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from benchmarks.side_by_side import Rounds, Side, median
from rosetrainer.commands.flags import parse_flags
from rosetrainer.config import GPTConfig
from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.model_flops import flops_per_token
from rosetrainer.validation import ConfigError, Count

Step = Callable[[], tuple[float, float]]
"""One update of a model: gives its loss before the update, and the gradients' norm."""


@dataclass(frozen=True)
class Work:
    """One update of a GPT on random tokens, timed."""

    model: GPTConfig = field(
        default_factory=lambda: GPTConfig(n_layers=4, d_model=768, n_heads=12, context_length=512)
    )
    batch_size: Count = 4
    """Sequences of a step."""
    steps: Count = 3
    """Steps timed in one round."""
    rounds: Count = 5
    """Rounds of each side, in turn."""

    @property
    def tokens(self) -> int:
        return self.batch_size * self.model.context_length

    @property
    def flops(self) -> int:
        return int(self.tokens * flops_per_token(self.model))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each (B, T), the same wherever they are made."""
        shape = (self.batch_size, self.model.context_length)
        generator = torch.Generator().manual_seed(1)
        ids, labels = torch.randint(self.model.vocab_size, (2, *shape), generator=generator)
        return ids, labels


def parse_work(argv: list[str], benchmark: str, default: Work | None = None) -> Work:
    """Raises ConfigError for what a user can get wrong."""
    work = parse_flags(Work, argv, f"python benchmarks/{benchmark}.py", default)
    check_work(work, 1, (default or Work()).model)
    return work


def check_work(work: Work, tp_size: int, usual: GPTConfig) -> None:
    """Raises ConfigError for what is no model on so many ranks, or not the one of the other sides.

    usual: what is compared unless flags say otherwise.
    """
    model = work.model
    model.check(tp_size)
    for name in ("d_head", "d_ff", "tied", "dropout", "architecture"):
        value, theirs = getattr(model, name), getattr(usual, name)
        if value != theirs:
            raise ConfigError(
                f"{name}={value}, and the other sides have {theirs}: leave --{name} out"
            )


def seconds_of(step: Step, steps: int) -> float:
    """The median of some steps, after one that warms up."""
    step()
    return median_seconds(step, steps)


def median_seconds(step: Step, steps: int) -> float:
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def matmul_peaks(dtypes: Iterable[str], seconds: float = 0.25) -> dict[str, float]:
    """FLOP/s of the best large product of this process, by dtype, with the kernels of training."""
    return {
        dtype: max(_peak(getattr(torch, dtype), n, transposed, seconds) for n, transposed in SHAPES)
        for dtype in dtypes
    }


SHAPES = [(n, transposed) for n in (1024, 2048) for transposed in (False, True)]


def _peak(dtype: torch.dtype, n: int, transposed: bool, seconds: float) -> float:
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    b = b.T if transposed else b  # as in a linear layer
    best, end = float("inf"), time.perf_counter() + seconds
    with fast_kernels(dtype, torch.device("cpu")):
        while time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def side_of(name: str, benchmark: str, argv: Sequence[str], threads: int = 2) -> Side:
    """`name` of benchmarks/`benchmark`.py: one round, or as many as it is asked for."""
    arguments = [f"benchmarks/{benchmark}.py", "--round", name, *argv]
    return Side(name, arguments, {"OMP_NUM_THREADS": str(threads)})


def peak_of(found: Rounds, dtype: Literal["float32", "bfloat16"]) -> float:
    """The best of all rounds: other work on the machine only ever makes it smaller."""
    return max(figures[dtype] for figures in found["peak"])


def print_table(
    work: Work, found: Rounds, dtypes: dict[str, Literal["float32", "bfloat16"]]
) -> None:
    """A line for each side. dtypes: in which each multiplies, so which peak it is held against."""
    for name, dtype in dtypes.items():
        seconds, peak = median(found, name, "seconds"), peak_of(found, dtype)
        rate = work.flops / seconds
        print(
            f"  {name:32} {seconds * 1e3:6.0f} ms a step  {work.tokens / seconds:6,.0f} tokens/s"
            f"  {rate / 1e9:5.0f} GFLOP/s  {rate / peak:4.0%} of the peak"
        )
    peaks = ", ".join(
        f"{dtype} {peak_of(found, dtype) / 1e9:.0f}" for dtype in sorted(set(dtypes.values()))
    )
    print(f"  matmul peak with two threads, GFLOP/s: {peaks}")
