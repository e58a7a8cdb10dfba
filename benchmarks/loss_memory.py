"""Output head and loss: bytes at the peak and time, in chunks and by torch's own functions.

python benchmarks/loss_memory.py

Forward and backward at GPT-2's vocabulary, in fp32 and bf16 autocast, each round a fresh process.
The bytes are counted, tensor by tensor, so they are the same in each round; beside them stands the
closed form. The plain way is F.linear and F.cross_entropy.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.side_by_side import Side, in_turn, introduce, keep, median, ratio_of
from rosetrainer.commands.flags import parse_flags
from rosetrainer.launch.rank import run_rank
from rosetrainer.validation import Count

WANTED = 3.0  # times fewer bytes, in both dtypes


@dataclass(frozen=True)
class Bench:
    """Measures head and loss in chunks beside torch's own."""

    vocabulary: Count = 50304
    d_model: Count = 768
    tokens: Count = 2048
    threads: Count = 2
    steps: Count = 3
    """Timed in one round, after one that is not."""
    rounds: Count = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a round; both are measured unless this is one."""


def measure(way: str, bench: Bench) -> None:
    """One round: prints bytes at the peak and the fastest step's seconds as JSON."""
    import torch
    import torch.nn.functional as F
    from peak import Peak

    from rosetrainer.optim.precision import autocast_for
    from rosetrainer.parallel.context import Axis
    from rosetrainer.parallel.sharding import init_weights
    from rosetrainer.parallel.vocab_parallel import VocabParallelEmbedding

    torch.set_num_threads(bench.threads)
    table = VocabParallelEmbedding(bench.vocabulary, bench.d_model, tp=Axis("tp"), init_std=0.02)
    init_weights(table, seed=1)
    x = torch.randn(1, bench.tokens, bench.d_model, requires_grad=True)
    labels = torch.randint(bench.vocabulary, (1, bench.tokens))
    autocast = autocast_for(getattr(torch, bench.dtype), x.device)

    def step() -> None:
        x.grad = table.weight.grad = None
        with autocast():
            if way == "chunks":
                loss, _ = table.loss(x, labels)
            else:
                loss = F.cross_entropy(F.linear(x, table.weight)[0], labels[0])
        loss.backward()

    with Peak(x, table.weight, labels) as peak:
        step()
    seconds = []
    for _ in range(bench.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"bytes": peak.bytes, "seconds": min(seconds)}))


def main(argv: list[str]) -> None:
    way = argv[1] if argv[:1] == ["--round"] else ""
    flags = argv[2:] if way else argv
    bench = parse_flags(Bench, flags, "python benchmarks/loss_memory.py")
    if way:
        measure(way, bench)
        return
    from rosetrainer.parallel.vocab_parallel import PADDED_TO
    from rosetrainer.planner.loss import bytes_in_chunks

    one = any(flag.startswith("--dtype") for flag in flags)
    dtypes = [bench.dtype] if one else ["float32", "bfloat16"]
    environment = {"OMP_NUM_THREADS": str(bench.threads)}
    sides = [
        Side(f"{way}, {dtype}", [__file__, "--round", way, *flags, "--dtype", dtype], environment)
        for dtype in dtypes
        for way in ("plain", "chunks")
    ]
    introduce(str(bench))
    pairs = {dtype: (f"plain, {dtype}", f"chunks, {dtype}") for dtype in dtypes}
    found = in_turn(sides, bench.rounds, pairs)
    rows = -(-bench.vocabulary // PADDED_TO) * PADDED_TO
    fewer, times = [], {}
    for dtype in dtypes:
        plain, ours = (median(found, f"{way}, {dtype}", "bytes") for way in ("plain", "chunks"))
        seconds = [median(found, f"{way}, {dtype}", "seconds") for way in ("plain", "chunks")]
        form = bytes_in_chunks(bench.tokens, bench.d_model, rows, 2 if dtype == "bfloat16" else 4)
        fewer.append(plain / ours)
        faster = ratio_of(found, *pairs[dtype])
        times[f"{dtype}, plain / chunks"] = round(faster, 4)
        print(f"  {dtype:9} plain   {plain:15,.0f} bytes at the peak  {seconds[0] * 1e3:7.0f} ms")
        print(f"  {dtype:9} chunks  {ours:15,.0f} bytes at the peak  {seconds[1] * 1e3:7.0f} ms")
        print(f"  {dtype:9} closed  {form:15,.0f} bytes, off by {ours - form:,.0f}")
        print(f"  {dtype:9} {plain / ours:.2f} x fewer bytes, {faster:.2f} x faster")
    keep("loss_memory", min(fewer), WANTED, found, time_ratios=times, bench=asdict(bench))


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
