"""Who works with whom: named axes over the ranks, passed on explicitly, never a global."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from environment import init_process_group, world_from_environment


@dataclass
class Traffic:
    """What one kind of collective has moved so far, in integers."""

    calls: int = 0
    payload_bytes: int = 0


@dataclass
class Ledger:
    """Counts an axis's collectives by (operation, phase); comm.py writes it."""

    entries: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def record(self, operation: str, phase: str, payload_bytes: int) -> None:
        entry = self.entries.setdefault((operation, phase), Traffic())
        entry.calls += 1
        entry.payload_bytes += payload_bytes


@dataclass(frozen=True, eq=False)
class Axis:
    """One way of dividing the work: `size` ranks, of which this is number `rank`.

    An axis of size 1 needs no process group: comm.py then communicates nothing.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ledger: Ledger = field(default_factory=Ledger, repr=False)


@dataclass(frozen=True)
class ParallelContext:
    """The axes of this rank. The default is one process: every axis of size 1."""

    dp: Axis = field(default_factory=lambda: Axis("dp"))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def init_parallel(device: str = "auto", timeout_seconds: float = 300.0) -> ParallelContext:
    """Starts the process group, where there is more than one rank; all ranks are data-parallel."""
    rank, world_size, _, _ = world_from_environment()
    chosen = init_process_group(device, timedelta(seconds=timeout_seconds))
    return ParallelContext(Axis("dp", world_size, rank, dist.group.WORLD), chosen)


def end_parallel() -> None:
    """Ends the process group, where there is one: the last call of a rank that ends well."""
    if dist.is_initialized():
        dist.destroy_process_group()
