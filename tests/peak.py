"""How many bytes of tensors were alive at once, counted: the same in each run, on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
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
            if key not in self.given:
                self.made[key] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.made.values()))
        return result


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
