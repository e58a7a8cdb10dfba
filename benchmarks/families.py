"""A Llama-shaped model beside Hugging Face's: tokens/s in training, and how long a file takes.

python benchmarks/families.py

Training: one process, two threads, the same model and the same work on each side, one step of each
in turn, in fp32 and, where the processor has it, in bf16. Loading: two tensor-parallel ranks, each
with its own slices, beside safetensors' load_file and a copy of what it maps, in fresh processes.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.our_step import OurStep
from benchmarks.plain_step import PlainStep
from benchmarks.side_by_side import (
    Figures,
    Rounds,
    Side,
    answer,
    in_turn,
    introduce,
    keep,
    median,
    ratio_of,
    staying,
)
from benchmarks.work import Step, Work, median_seconds, parse_work, side_of
from rosetrainer.checkpoint.huggingface.families import model_of, written_as
from rosetrainer.checkpoint.huggingface.load import find_weights, load_weights
from rosetrainer.checkpoint.huggingface.write import write_folder
from rosetrainer.config import GPTConfig
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.processor import has_native_bf16
from rosetrainer.launch.rank import run_rank
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.sharding import shard_spec

NAME = "families"
LLAMA: dict[str, Any] = {"architecture": "llama", "bias": False, "tied": False}
DEFAULT = Work(
    GPTConfig(32000, 512, 4, 12, 768, d_ff=2048, n_kv_heads=4, **LLAMA),
    steps=1,
    rounds=20,
)
LARGE = GPTConfig(32000, 1024, 16, 16, 1024, d_ff=2816, n_kv_heads=8, **LLAMA)  # 1.04 GiB in fp32
OURS, THEIRS = "ours", "Hugging Face Llama"
FILE, RANKS = "load_file and a copy", "ours, tp 2"
DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
TRAINING_WANTED, LOADING_WANTED, LOADINGS = 1.2, 1.3, 7
UNTIMED = 3
"""First steps of a process, in which it takes its memory from the kernel."""


class HuggingFaceLlama(nn.Module):
    """transformers' LlamaForCausalLM as PlainGPT's forward pass; its loss takes labels as ours."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils.logging import set_verbosity_error

        set_verbosity_error()  # else it remarks on a default of its own
        torch.manual_seed(1)
        _, theirs = written_as(config)
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        self.theirs = LlamaForCausalLM(LlamaConfig(**{**theirs, **ids, "use_cache": False}))
        assert self.theirs.config._attn_implementation == "sdpa"

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        # Given labels alone it would shift them: a last token less, and a copy.
        return self.theirs(ids, labels=labels, shift_labels=labels).loss


def measure(name: str, work: Work) -> Callable[[], Figures]:
    """Sets the side up; what it gives measures a round."""
    who, _, dtype = name.rpartition(", ")
    chosen: torch.dtype = getattr(torch, DTYPES[dtype])
    step: Step
    if who == OURS:
        keep_freed_memory()  # as `train` does
        step = OurStep(work, chosen)
    else:
        step = PlainStep(work, chosen, HuggingFaceLlama(work.model))
    for _ in range(UNTIMED):
        step()
    return lambda: {"seconds": median_seconds(step, work.steps)}


def write_large(folder: Path) -> None:
    """The folder of a model with random weights, as `convert to-hf` writes it."""
    specs = {
        name: shard_spec(parameter)
        for name, parameter in build_model(
            LARGE, ParallelContext(device=torch.device("meta"))
        ).named_parameters()
    }

    def whole(name: str) -> Tensor:
        return torch.randn(specs[name].dense_shape)

    folder.mkdir()
    write_folder(folder, LARGE, specs, whole, torch.float32, 2**40)


def load_ours(folder: Path, rank: int, ready: Any, results: Any) -> None:
    torch.set_num_threads(1)
    context = ParallelContext(tp=Axis("tp", size=2, rank=rank))
    ready.wait()
    began = time.perf_counter()
    config = model_of(folder)
    model = build_model(config, context)
    load_weights(model, find_weights(folder, config))
    results.put(time.perf_counter() - began)


def loading(name: str, folder: Path) -> Figures:
    """Seconds until all weights are in memory: of the rank that takes longest."""
    from safetensors.torch import load_file

    if name == FILE:
        torch.set_num_threads(2)
        began = time.perf_counter()
        held = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
        return {"seconds": time.perf_counter() - began, "tensors": len(held)}
    fork = multiprocessing.get_context("fork")
    ready, results = fork.Barrier(2), fork.Queue()
    ranks = [fork.Process(target=load_ours, args=(folder, r, ready, results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    seconds = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    return {"seconds": max(seconds)}


def compare_training(work: Work, argv: list[str]) -> Rounds:
    native = has_native_bf16(torch.device("cpu"))
    dtypes = [name for name in DTYPES if native or name == "fp32"]
    if not native:
        print("this processor has no native bf16: it is emulated, and not compared")
    names = {dtype: (f"{THEIRS}, {dtype}", f"{OURS}, {dtype}") for dtype in dtypes}
    sides = [side_of(name, NAME, argv) for pair in names.values() for name in pair]
    pairs = {f"families-{dtype}": pair for dtype, pair in names.items()}
    with staying(sides) as ready:
        found = in_turn(ready, work.rounds, pairs)
    for name in found:
        rate = work.tokens / median(found, name, "seconds")
        milliseconds = median(found, name, "seconds") * 1000
        print(f"  {name:26} {milliseconds:6.0f} ms a step {rate:8,.0f} tokens/s")
    for name, pair in pairs.items():
        keep(name, ratio_of(found, *pair), TRAINING_WANTED, found)
    return found


def compare_loading() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "llama"
        write_large(folder)
        script = str(Path(__file__).resolve())
        sides = [Side(name, [script, "--load", name, str(folder)]) for name in (FILE, RANKS)]
        # The time of ours as a multiple of theirs.
        found = in_turn(sides, LOADINGS, {"families-loading": (RANKS, FILE)})
    for name in found:
        print(f"  {name:26} {median(found, name, 'seconds'):6.2f} s")
    keep("families-loading", ratio_of(found, RANKS, FILE), LOADING_WANTED, found, at_most=True)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--round"]:
        answer(measure(argv[1], parse_work(argv[2:], NAME, default=DEFAULT)))
        return
    if argv[:1] == ["--load"]:
        print(json.dumps(loading(argv[1], Path(argv[2]))))
        return
    work = parse_work(argv, NAME, default=DEFAULT)
    introduce(f"{work}, 2 threads")
    if find_spec("transformers"):
        compare_training(work, argv)
    else:
        print("no transformers here to train beside: pip install -r requirements-dev.txt")
    compare_loading()


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
