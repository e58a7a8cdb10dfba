"""Tokens/s: ours against a plain GPT-2 in bf16, and against Hugging Face's in fp32.

python benchmarks/tokens_per_second.py

One process, two threads, the same model and the same work on each side, one step of each in turn;
this machine's matmul peak in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.our_step import OurStep
from benchmarks.plain_step import HuggingFaceGPT2, PlainStep
from benchmarks.side_by_side import (
    Figures,
    Rounds,
    answer,
    in_turn,
    introduce,
    keep,
    median,
    ratio_of,
    staying,
)
from benchmarks.work import (
    Step,
    Work,
    matmul_peaks,
    median_seconds,
    parse_work,
    peak_of,
    print_table,
    side_of,
)
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.processor import has_native_bf16
from rosetrainer.launch.rank import run_rank

NAME = "tokens_per_second"
OURS_BF16, PLAIN_BF16 = "ours, bf16", "plain GPT-2, bf16"
OURS_FP32, HUGGING_FACE = "ours, fp32", "Hugging Face GPT-2, fp32"
SIDES: dict[str, Callable[[Work], Step]] = {
    OURS_BF16: lambda work: OurStep(work, torch.bfloat16),
    PLAIN_BF16: lambda work: PlainStep(work, torch.bfloat16),
    OURS_FP32: lambda work: OurStep(work, torch.float32),
    HUGGING_FACE: lambda work: PlainStep(work, torch.float32, HuggingFaceGPT2(work.model)),
}
PAIRS = {
    "tokens-per-second-bf16": (PLAIN_BF16, OURS_BF16),
    "tokens-per-second-fp32": (HUGGING_FACE, OURS_FP32),
}
BF16_WANTED, FP32_WANTED, PEAK_WANTED = 1.3, 1.1, 0.85
DEFAULT = Work(steps=1, rounds=30)
UNTIMED = 3
"""First steps of a process, in which it takes its memory from the kernel."""


def measure(name: str, work: Work) -> Callable[[], Figures]:
    """Sets the side up; what it gives measures a round."""
    if name == "peak":
        return partial(matmul_peaks, sorted(set(sides_here().values())), seconds=0.1)
    if name in (OURS_BF16, OURS_FP32):
        keep_freed_memory()  # as `train` does
    step = SIDES[name](work)
    for _ in range(UNTIMED):
        step()
    return lambda: {"seconds": median_seconds(step, work.steps)}


def fp32_wanted(work: Work, found: Rounds) -> float:
    """1.1 times Hugging Face, or 85 % of the peak where that is less."""
    theirs = work.flops / median(found, HUGGING_FACE, "seconds")
    return min(FP32_WANTED, PEAK_WANTED * peak_of(found, "float32") / theirs)


def sides_here() -> dict[str, Literal["float32", "bfloat16"]]:
    """The sides that this machine can run, each with its dtype."""
    sides: dict[str, Literal["float32", "bfloat16"]] = {OURS_FP32: "float32"}
    if has_native_bf16(torch.device("cpu")):
        sides = {OURS_BF16: "bfloat16", PLAIN_BF16: "bfloat16", **sides}
    if find_spec("transformers"):
        sides[HUGGING_FACE] = "float32"
    return sides


def name_missing(sides: Collection[str]) -> None:
    if OURS_BF16 not in sides:
        print("this processor has no native bf16: it is emulated, and not compared")
    if HUGGING_FACE not in sides:
        print("no transformers here, so no Hugging Face side: pip install -r requirements-dev.txt")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--round"]:
        answer(measure(argv[1], parse_work(argv[2:], NAME, default=DEFAULT)))
        return
    work = parse_work(argv, NAME, default=DEFAULT)
    introduce(f"{work}, 2 threads")
    dtypes = sides_here()
    name_missing(dtypes)
    pairs = {name: pair for name, pair in PAIRS.items() if set(pair) <= set(dtypes)}
    with staying([side_of(name, NAME, argv) for name in (*dtypes, "peak")]) as sides:
        found = in_turn(sides, work.rounds, pairs)
    print_table(work, found, dtypes)
    for name, pair in pairs.items():
        wanted = BF16_WANTED if OURS_BF16 in pair else fp32_wanted(work, found)
        keep(name, ratio_of(found, *pair), wanted, found)


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
