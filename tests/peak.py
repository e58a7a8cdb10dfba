"""How many bytes of tensors were alive at once, counted: the same in each run, on any machine."""

from __future__ import annotations

import gc
import os
from bisect import bisect, bisect_left
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The most bytes of storages alive at once besides those given; no allocator is asked."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = storages(given)
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            known = self.made.get(key)
            new = known is None or known[0].expired() or known[1] != storage.nbytes()
            if new and key not in self.given:
                self.made[key] = StorageWeakRef(storage), storage.nbytes()
                self.count()
        return result

    def count(self) -> None:
        """Of those that are there, as large as they are now."""
        alive = {key: alive_at(reference) for key, (reference, _) in self.made.items()}
        self.made = {k: (self.made[k][0], s.nbytes()) for k, s in alive.items() if s is not None}
        self.bytes = max(self.bytes, sum(size for _, size in self.made.values()))


def alive_at(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage, whose size may have changed; None if it is gone."""
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


class Allocated:
    """What torch's allocator holds of all that it has given inside, kernels' own tensors too."""

    MARK = "from here on"

    def __enter__(self) -> Allocated:
        gc.collect()  # what is freed later would count as if it had been given inside
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its start and end
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)

    def mark(self) -> None:
        """From here on the peak is looked for."""
        with record_function(self.MARK):
            pass

    @property
    def peak(self) -> int:
        """Bytes, the most at once since the last mark.

        What gloo's threads free has no event, and is not in the sums that the allocator tells. It
        is known to be gone once its place is given again.
        """
        results: Any = self.profile.profiler.kineto_results
        events, found = list(results.experimental_event_tree()), []
        for event in events:  # grows meanwhile
            events += event.children
            if event.name in ("[memory]", self.MARK):
                found.append(event)
        found.sort(key=lambda one: one.start_time_ns)
        given, most = Places(), 0
        for event in found:
            if event.name == self.MARK:
                most = given.bytes
            elif event.extra_fields.alloc_size > 0:
                given.give(event.extra_fields.ptr, event.extra_fields.alloc_size)
                most = max(most, given.bytes)
            else:
                given.free(event.extra_fields.ptr)
        return most


class Places:
    """Of an address space, what is given and not yet free, or given again."""

    def __init__(self) -> None:
        self.starts, self.ends, self.bytes = list[int](), dict[int, int](), 0

    def give(self, start: int, size: int) -> None:
        first = bisect(self.starts, start)
        if first and self.ends[self.starts[first - 1]] > start:
            first -= 1
        last = bisect_left(self.starts, start + size)
        for gone in self.starts[first:last]:
            self.free(gone)
        self.starts.insert(first, start)
        self.ends[start] = start + size
        self.bytes += size

    def free(self, start: int) -> None:
        """Nothing, if it was given before all of these."""
        if start in self.ends:
            self.starts.pop(bisect_left(self.starts, start))
            self.bytes -= self.ends.pop(start) - start
