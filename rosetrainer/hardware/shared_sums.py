"""All-reduce among ranks of one machine, through memory that they share.

gloo's goes through sockets, in pieces and by a thread of its own, which takes three to five times
the processor time. Here each rank copies its tensor into the shared memory, tells every other one
by a byte, and adds up what they have copied. All add in the order of the ranks, so they have the
same bits; two numbers commute, so of two ranks the sum has gloo's bits too.

The bytes go through sockets: who waits for one sleeps, so the hang watch sees that nothing is done,
and a rank that has ended is noticed, as with gloo.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from rosetrainer.hardware.shared_memory import share_memory

TORCHS_ALL_REDUCE = dist.all_reduce
LARGEST = 64 * 2**20  # bytes of a tensor; of the memory only what has been written to is there
ADDS: dict[Any, Callable[..., Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
}


class Work:
    """As a dist.Work: something under way, which wait() ends."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> bool:
        if self._finish:
            self._finish()
            self._finish = None  # and with it the tensor
        return True


class SharedSums:
    """A group's. The memory has two halves, used in turn, with a place for each rank's tensor.

    A rank that copies into a half has seen all others begin the sum before, so end the one before
    that, which lay in this half.
    """

    def __init__(self, memory: Tensor, peers: list[socket.socket], rank: int) -> None:
        """memory: bytes, for two halves; peers: to each other rank."""
        self._halves = memory.view(2, len(peers) + 1, -1)
        self._peers, self._rank, self._begun = peers, rank, 0
        self._last = Work(lambda: None)

    def __del__(self) -> None:
        for peer in self._peers:
            peer.close()

    def start(self, tensor: Tensor, op: Any) -> Work:
        """An all-reduce of the tensor, in place, under way; the one before it is ended first."""
        self._last.wait()
        half = self._halves[self._begun % 2, :, : tensor.nbytes]
        parts = [place.view(tensor.dtype).view(tensor.shape) for place in half]
        parts[self._rank].copy_(tensor)
        self._begun += 1
        with lost_peers():
            for peer in self._peers:
                peer.send(b".")

        def finish() -> None:
            with lost_peers():
                if not all(peer.recv(1) for peer in self._peers):
                    raise EOFError("its process has ended")
            total, *rest = parts
            for part in rest:
                total = ADDS[op](total, part, out=tensor)

        self._last = Work(finish)
        return self._last


@contextmanager
def lost_peers() -> Iterator[None]:
    """Raises RuntimeError, as gloo does, when a peer has ended or has not come in time."""
    try:
        yield
    except BlockingIOError:
        raise RuntimeError("Timed out waiting for another rank of this machine") from None
    except (OSError, EOFError) as error:
        raise RuntimeError(f"Connection closed by peer: {error}") from None


FOUND: WeakKeyDictionary[dist.ProcessGroup, SharedSums | str] = WeakKeyDictionary()
"""By the group, once it has been asked for: its sums, or why gloo makes them."""


def open_sums(group: Any, wanted: bool = True) -> str:
    """From now on a group's sums go through shared memory if they can; else why they do not.

    All ranks of the group call this; a second call changes nothing.
    """
    if group is None:
        return ""
    if group not in FOUND:
        FOUND[group] = _open(group) if wanted else "shared_memory=off"
    found = FOUND[group]
    return found if isinstance(found, str) else ""


def _open(group: Any) -> SharedSums | str:
    shared = share_memory(group, 2 * dist.get_world_size(group) * LARGEST)
    return shared if isinstance(shared, str) else SharedSums(*shared, dist.get_rank(group))


def all_reduce(tensor: Tensor, op: Any, group: Any, async_op: bool) -> Any:
    """As torch's, by which go tensors that are too large or no floating-point numbers, other ops,
    and groups that have not been opened."""
    sums = FOUND.get(group) if group is not None else None
    fits = tensor.is_floating_point() and tensor.nbytes <= LARGEST and op in ADDS
    if isinstance(sums, SharedSums) and fits:
        assert async_op and tensor.is_contiguous()
        return sums.start(tensor, op)
    return TORCHS_ALL_REDUCE(tensor, op=op, group=group, async_op=async_op)
