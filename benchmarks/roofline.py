"""A step beside this machine's limits, operation by operation: what it takes, and what it could.

python benchmarks/roofline.py

The step of tokens_per_second.py, one process with two threads. Each operation of torch is noted
with its time, its floating-point operations and the bytes that it reads and writes; its limit is
what the machine's best product takes for as many operations, or a copy for as many bytes, whichever
is longer. Both rates are measured in the same run. A limit is for what is computed: exp or tanh
takes longer than its bytes do, so no step reaches the sum.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.our_step import OurStep
from benchmarks.side_by_side import introduce, keep
from benchmarks.work import Step, Work, matmul_peaks, parse_work
from rosetrainer.hardware.memory import keep_freed_memory
from rosetrainer.hardware.processor import has_native_bf16
from rosetrainer.launch.rank import run_rank

NAME = "roofline"
WANTED = 0.75
"""Of the rate of the machine's best product, what the model's operations may reach."""
DEFAULT = Work(steps=1, rounds=15)
UNTIMED = 3
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
SHORT = {
    "_linear_pointwise": "oneDNN's linear",
    ATTENTION: "attention",
    f"{ATTENTION}_backward": "attention's backward",
}
NO_MOVE = ("detach", "new_empty", "empty", "empty_like", "unbind")
PIECES = [2**n for n in range(14, 28)]
"""Bytes of the copies that are measured."""


class Call(NamedTuple):
    """One operation of a step. flops: those of its products."""

    name: str
    seconds: float
    flops: int
    bytes: int


class Notes(TorchDispatchMode):
    """Notes each operation while it is active, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        since = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - since
        name = func.overloadpacket.__name__
        flops = products(func, args, kwargs or {}, result)
        if flops:
            shapes = [str(tuple(one.shape)) for one in tree_leaves(args) if isinstance(one, Tensor)]
            first = name in ("addmm", "baddbmm_")  # behind what they add to
            name = f"{SHORT.get(name, name)} " + " x ".join(shapes[first : first + 2])
        self.calls.append(Call(name, seconds, flops, moved(func, args, kwargs or {}, result)))
        return result


def products(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of its matrix products; attention looks at half of the tokens."""
    name = func.overloadpacket.__name__
    if name == "_linear_pointwise":
        return 2 * args[0].numel() * args[1].shape[0]
    if name == ATTENTION:
        return int(sdpa_flop_count(*(one.shape for one in args[:3]))) // 2
    if name == f"{ATTENTION}_backward":
        return int(sdpa_backward_flop_count(*(one.shape for one in args[:4]))) // 2
    in_place = getattr(torch.ops.aten, name.removesuffix("_"), None)  # counted as the other one
    count = flop_registry.get(func.overloadpacket) or flop_registry.get(in_place)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def moved(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that it must read or write; a view moves none."""
    if func.is_view or func.overloadpacket.__name__ in NO_MOVE:
        return 0
    read = {id(one): one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
    written = {id(one): one for one in tree_leaves(result) if isinstance(one, Tensor)}
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {id(one): one for one in tree_leaves(value) if isinstance(one, Tensor)}
    return sum(size(one) for group in (read, written) for one in group.values())


def size(tensor: Tensor) -> int:
    """Bytes, of what is repeated by a stride of 0 once."""
    numbers = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= length if stride else 1
    return numbers * tensor.element_size()


def copy_rates(seconds: float = 0.05) -> dict[int, float]:
    """Bytes read and written per second, of the fastest copy, by how many they are."""
    return {2 * piece: 2 * piece / fastest_copy(piece, seconds) for piece in PIECES}


def fastest_copy(piece: int, seconds: float) -> float:
    source, target = torch.ones(piece // 4), torch.zeros(piece // 4)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        since = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - since)
    return best


class Limits(NamedTuple):
    """What this machine can do: product operations, and bytes by how many, per second."""

    products: float
    copies: dict[int, float]

    def seconds(self, call: Call) -> float:
        nearest = min(self.copies, key=lambda piece: abs(piece - call.bytes))
        copies = max(self.copies[nearest], self.copies[max(self.copies)])  # small ones: the call
        return max(call.flops / self.products, call.bytes / copies)


def noted(step: Step) -> list[Call]:
    with Notes() as notes:
        step()
    return notes.calls


class Row(NamedTuple):
    calls: int
    seconds: float
    limit: float


def rows_of(steps: list[list[Call]], limits: Limits) -> dict[str, Row]:
    """By operation; each call with its median over the steps, which are alike."""
    assert len({tuple(call.name for call in calls) for calls in steps}) == 1
    found: dict[str, Row] = defaultdict(lambda: Row(0, 0.0, 0.0))
    for calls in zip(*steps, strict=True):
        row, seconds = found[calls[0].name], statistics.median(call.seconds for call in calls)
        limit = limits.seconds(calls[0])
        found[calls[0].name] = Row(row.calls + 1, row.seconds + seconds, row.limit + limit)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def report(rows: dict[str, Row], step: float, work: Work, limits: Limits) -> None:
    print(f"  {'operation':62} {'calls':>5} {'ms':>7} {'limit':>7}")
    large = {name: row for name, row in rows.items() if row.seconds > step / 200}
    every = total(rows.values())
    rest = total(row for name, row in rows.items() if name not in large)
    for name, row in [
        *large.items(),
        ("all others", rest),
        ("the step", every._replace(seconds=step)),
    ]:
        print(f"  {name:62} {row.calls:5} {row.seconds * 1e3:7.1f} {row.limit * 1e3:7.1f}")
    print(f"  of the step between operations: {(step - every.seconds) * 1e3:.1f} ms")
    for what, seconds in (("as it is", step), ("at all of its limits", every.limit)):
        share = work.flops / seconds / limits.products
        print(f"  the model's products in the step {what}: {share:.0%} of the peak")


def total(rows: Iterable[Row]) -> Row:
    calls, seconds, limits = zip(Row(0, 0.0, 0.0), *rows, strict=True)
    return Row(sum(calls), sum(seconds), sum(limits))


def measure(step: Step, rounds: int) -> tuple[list[list[Call]], float]:
    """(the calls of each noted step, the median of as many steps that nothing notes, in turn)"""
    for _ in range(UNTIMED):
        step()
    calls, plain = [], []
    for _ in range(rounds):
        calls.append(noted(step))
        since = time.perf_counter()
        step()
        plain.append(time.perf_counter() - since)
    return calls, statistics.median(plain)


def main(argv: list[str]) -> None:
    work = parse_work(argv, NAME, default=DEFAULT)
    torch.set_num_threads(2)
    keep_freed_memory()  # as `train` does
    introduce(f"{work}, one process with 2 threads")
    native = has_native_bf16(torch.device("cpu"))
    for dtype in [torch.bfloat16] * native + [torch.float32]:
        name = str(dtype).removeprefix("torch.")
        limits = Limits(matmul_peaks([name])[name], copy_rates())
        calls, step = measure(OurStep(work, dtype), work.rounds)
        fastest = max(limits.copies.values())
        slowest = min(limits.copies.values())
        print(
            f"{name}: products at {limits.products / 1e9:.0f} GFLOP/s, "
            f"copies at {slowest / 1e9:.1f} to {fastest / 1e9:.1f} GB/s"
        )
        rows = rows_of(calls, limits)
        report(rows, step, work, limits)
        rounds = {name: [{"seconds": step, "flops": work.flops, "peak": limits.products}]}
        keep(f"{NAME}-{name}", work.flops / step / limits.products, WANTED, rounds)


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
