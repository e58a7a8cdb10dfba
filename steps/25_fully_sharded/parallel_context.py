"""Who works with whom: named axes over the ranks, passed on explicitly, never a global.

World rank r = (pp_rank x dp_size + dp_rank) x tp_size + tp_rank: the ranks of one tensor-parallel
group are neighbours, because they talk most and neighbours share a machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from config import ParallelConfig
from environment import init_process_group, world_from_environment


@dataclass
class Traffic:
    """What one kind of collective has moved so far, in integers."""

    calls: int = 0
    payload_bytes: int = 0


@dataclass
class Ledger:
    """Counts an axis's collectives by (operation, phase); comm.py writes it.

    `collectives_started`, of all kinds, and `wait_seconds`, in which this rank could only wait for
    them, go on when the entries are cleared.
    """

    entries: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    in_recompute: bool = False
    collectives_started: int = 0
    wait_seconds: float = 0.0

    def record(self, operation: str, phase: str, payload_bytes: int) -> None:
        self.collectives_started += 1
        if self.in_recompute and phase == "forward":
            phase = "recompute"
        entry = self.entries.setdefault((operation, phase), Traffic())
        entry.calls += 1
        entry.payload_bytes += payload_bytes

    def clear(self) -> None:
        self.entries.clear()

    def recomputing(self) -> Recomputing:
        """Inside this context, what a forward pass moves counts as recompute."""
        return Recomputing(self)


@dataclass(frozen=True)
class Recomputing:
    """A context that can be entered again, as a second backward pass of one graph does."""

    ledger: Ledger

    def __enter__(self) -> None:
        self.ledger.in_recompute = True

    def __exit__(self, *_: object) -> None:
        self.ledger.in_recompute = False


@dataclass(frozen=True, eq=False)
class Axis:
    """One way of dividing the work: `size` ranks, of which this is number `rank`.

    An axis of size 1 needs no process group: comm.py then communicates nothing. Under sequence
    parallelism the axis also divides the tokens wherever it divides nothing else.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ledger: Ledger = field(default_factory=Ledger, repr=False)
    divides_batch: bool = False  # its ranks see different tokens: gradients are summed over it
    sequence_parallel: bool = False
    overlap: bool = True  # of a layer's backward pass with its collectives


@dataclass(frozen=True)
class ParallelContext:
    """The axes of this rank. The default is one process: every axis of size 1."""

    tp: Axis = field(default_factory=lambda: Axis("tp"))
    dp: Axis = field(default_factory=lambda: Axis("dp", divides_batch=True))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    recompute: str = "none"  # or "attention", or "block": what is computed again, not kept
    pp: Axis = field(default_factory=lambda: Axis("pp"))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # what it was built from

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.pp, self.dp, self.tp)

    @property
    def world_size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def rank(self) -> int:
        return (self.pp.rank * self.dp.size + self.dp.rank) * self.tp.size + self.tp.rank


def init_parallel(
    parallel: ParallelConfig, device: str = "auto", timeout_seconds: float = 300.0
) -> ParallelContext:
    """Starts the process group, where there is more than one rank, and builds the axes over it.

    Raises ConfigError, before anything starts, if the sizes do not fit the world size.
    """
    world_size = world_from_environment()[1]
    tp_size, dp_size = parallel.resolve(world_size)
    timeout = timedelta(seconds=timeout_seconds)
    chosen = init_process_group(device, timeout)
    if world_size == 1:
        return ParallelContext(device=chosen, recompute=parallel.recompute, parallel=parallel)
    pp_size = parallel.pp_size
    mesh = torch.arange(world_size).view(pp_size, dp_size, tp_size)  # world ranks, (pp, dp, tp)

    def axis(name: str, dim: int) -> Axis:
        """The ranks along a dimension of the mesh are a group; the axis is that of this rank."""
        groups = mesh.movedim(dim, -1).flatten(0, 1)
        size, group = groups.shape[1], dist.group.WORLD
        if size < world_size:
            # Not by DeviceMesh, whose groups have torch's own time limit, half an hour.
            group, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=timeout)
        return Axis(name, size, dist.get_rank(group), group, divides_batch=name == "dp")

    sequence, overlap = parallel.sequence_parallel, parallel.overlap
    tp = replace(axis("tp", 2), sequence_parallel=sequence, overlap=overlap)
    dp, pp = axis("dp", 1), axis("pp", 0) if pp_size > 1 else Axis("pp")
    return ParallelContext(tp, dp, chosen, parallel.recompute, pp, parallel)


def end_parallel() -> None:
    """Ends the process group, where there is one: the last call of a rank that ends well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def init_tensor_parallel(tp_size: int | None = None, device: str = "auto") -> ParallelContext:
    """The front door: this rank's context, all ranks tensor-parallel unless tp_size says fewer.

    Works under torchrun, and alone as one process. Raises ConfigError if tp_size does not fit.
    """
    return init_parallel(ParallelConfig(tp_size=tp_size), device)
