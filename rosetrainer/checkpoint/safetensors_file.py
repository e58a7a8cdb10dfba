"""Writes a safetensors file tensor by tensor; the library would want all of them at once.

The format: the header's length in 8 bytes, the header in JSON, then the tensors in its order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rosetrainer.validation import ConfigError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""What safetensors calls the dtypes that weights can be."""


class Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """A file of the entries; `tensors` gives them in their order, one at a time."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        offsets, end = [end, end + entry.size], end + entry.size
        of_entry = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape)}
        header[entry.name] = of_entry | {"data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        source = iter(tensors)
        for entry in entries:
            tensor = next(source)
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                was = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ConfigError(f"{entry.name} is {was}, not {entry.dtype} {entry.shape}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
