"""Measures when two ranks compute, and when they wait for each other, in a part of a model."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ladder import StepError, find, python_files
from tries import capture, command

ROUNDS = 15  # of which the one of median length is kept
SCRIPT = """
import json, sys
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
import torch, torch.distributed as dist
import comm, model, parallel_context
from config import GPTConfig
from sharding import init_weights
from vocab_parallel import VocabParallelEmbedding
import vocab_parallel

seen = {"waits": [], "sums": [], "dX": [], "dW": []}

def timed(call):
    def timed_call(*args, **settings):
        begin = perf_counter()
        result = call(*args, **settings)
        seen["waits"].append((begin, perf_counter()))
        return result
    return timed_call

if hasattr(comm, "Pending"):
    comm.Pending.wait = timed(comm.Pending.wait)
else:
    dist.all_reduce = timed(dist.all_reduce)
    comm._all_gather_single = timed(comm._all_gather_single)
    comm._reduce_scatter_single = timed(comm._reduce_scatter_single)
context = parallel_context.init_parallel(parallel_context.ParallelConfig(), "cpu")
torch.manual_seed(1)
BUILD
runs = [build(variant) for variant in VARIANTS]
found = [[] for _ in runs]
for number in range(ROUNDS + 1):
    for kept, run in zip(found, runs):
        dist.barrier()
        for spans in seen.values():
            spans.clear()
        begin = perf_counter()
        loss = run()
        half = perf_counter()
        with AROUND:
            loss.backward()
        if number:
            end = perf_counter()
            kept.append([begin, half, end, {name: list(spans) for name, spans in seen.items()}])
with open(f"{context.rank}.json", "w") as file:
    json.dump(found, file)
parallel_context.end_parallel()
"""


@dataclass(frozen=True)
class Timeline:
    """Named variants, and code that defines build(variant): a function that gives a loss."""

    variants: dict[str, object]
    build: str
    around: str = "nullcontext()"  # what a backward pass runs in


TIMELINES = {
    "15": Timeline(
        {"all-reduce": False, "reduce-scatter": True},
        """
def build(sequence_parallel):
    tp = replace(context.tp, sequence_parallel=sequence_parallel)
    config = GPTConfig(vocab_size=8, n_layers=1, n_heads=8, d_model=256, context_length=256)
    block = model.TransformerBlock(config, tp)
    init_weights(block, 1)
    x = torch.randn(4, 256 // (tp.size if sequence_parallel else 1), 256, requires_grad=True)
    return lambda: block(x).square().mean()
""",
    ),
    "19": Timeline(
        {"no overlap": False, "overlap": True},
        """
from torch.utils._python_dispatch import TorchDispatchMode
from tensor_parallel import ColumnParallelLinear

class Products(TorchDispatchMode):
    def __torch_dispatch__(self, call, types, args=(), settings=None):
        begin = perf_counter()
        result = call(*args, **(settings or {}))
        if call is torch.ops.aten.mm.default:
            name = "dX" if len(result) == 4 * 128 else "dW"
            seen[name].append((begin, perf_counter()))
        return result

all_reduce = dist.all_reduce

def noted(*args, **settings):
    begin = perf_counter()
    work = all_reduce(*args, **settings)
    work.get_future().then(lambda _: seen["sums"].append((begin, perf_counter())))
    return work

dist.all_reduce = noted

def build(overlap):
    layer = ColumnParallelLinear(512, 1536, tp=replace(context.tp, overlap=overlap))
    init_weights(layer, 1)
    x, gradient = torch.randn(4, 128, 512, requires_grad=True), torch.randn(4, 128, 768)
    def run():
        layer.zero_grad()
        return (layer(x) * gradient).sum()
    return run
""",
        around="Products()",
    ),
    "20": Timeline(
        {"1": 16 * 2**20, "4": 4 * 2**20},
        """
def build(chunk_bytes):
    table = VocabParallelEmbedding(8192, 256, tp=context.tp, init_std=0.02)
    init_weights(table, 1)
    x = torch.randn(4, 256, 256, requires_grad=True)
    labels = torch.randint(8192, (4, 256))
    def run():
        vocab_parallel.CHUNK_BYTES["cpu"] = chunk_bytes
        return table.loss(x, labels)[0]
    return run
""",
    ),
}


def measured(number: str) -> dict[str, list[dict[str, object]]]:
    """For each variant what each rank did, in ms from the first rank's begin, of a median round.

    `half`: the end of its forward pass, `end`: of its backward pass; [from, to] of each of its
    `waits` for a collective and, where the step's code notes them, of `sums` under way and of the
    products `dX` and `dW`. Raises StepError if the run fails.
    """
    step, timeline = find(number), TIMELINES[number]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in python_files(step):
            shutil.copy(step / name, folder / name)
        script = SCRIPT.replace("BUILD", timeline.build).replace("ROUNDS", str(ROUNDS))
        script = script.replace("AROUND", timeline.around)
        variants = str(list(timeline.variants.values()))
        (folder / "measured.py").write_text(script.replace("VARIANTS", variants))
        done = capture(command("measured.py", step, 2), folder)
        if done.returncode:
            raise StepError(f"the timeline of {step.name} failed: {done.stderr[-300:]}")
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    kept = {}
    for place, name in enumerate(timeline.variants):
        rounds = list(zip(*(rank[place] for rank in ranks), strict=True))
        rounds.sort(key=lambda both: max(r[2] for r in both) - min(r[0] for r in both))
        both = rounds[len(rounds) // 2]
        zero = min(begin for begin, *_ in both)
        kept[name] = [
            {
                "half": ms(half - zero),
                "end": ms(end - zero),
                **{
                    name: [[ms(since - zero), ms(until - zero)] for since, until in spans]
                    for name, spans in seen.items()
                    if spans
                },
            }
            for _, half, end, seen in both
        ]
    return kept


def ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
