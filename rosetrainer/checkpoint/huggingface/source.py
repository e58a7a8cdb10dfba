"""Of which of their tensors one of ours is made, and how a part of ours is read from them.

Shape letters: s blocks of a fused projection (3 of q, k, v), n rows of a block, I columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rosetrainer.checkpoint.huggingface.folder import Stored
from rosetrainer.checkpoint.safetensors_file import NAMES
from rosetrainer.durable_files import short
from rosetrainer.parallel.sharding import ShardSpec
from rosetrainer.validation import ConfigError

NOTHING = re.compile(r"(?!)")
"""Matches no name."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}
"""What weights may be, by what safetensors calls it."""


def split_name(name: str) -> tuple[str | None, str, str]:
    """Of a parameter of ours: the number of its block, if it is in one, its module, weight or
    bias."""
    module, leaf = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return None, module, leaf
    _, number, inner = module.split(".", 2)
    return number, inner, leaf


@dataclass(frozen=True)
class Source:
    """Their tensors by name, which stacked along the rows, in this order, are one of ours.

    transposed: as (I, rows), the way GPT-2's file has them.
    """

    names: tuple[str, ...]
    transposed: bool = False

    def shape_of_each(self, spec: ShardSpec) -> tuple[int, ...]:
        """As it stands in the file."""
        rows, *columns = spec.dense_shape
        shape = (rows // len(self.names), *columns)
        return shape[::-1] if self.transposed else shape

    def read(
        self,
        stored: Mapping[str, Stored],
        spec: ShardSpec,
        first: Sequence[int],
        whole: Tensor,
    ) -> None:
        """Fills `whole` with the part of our tensor of spec.shape that begins at this index.

        Nothing else is read. Raises ConfigError for a file that is cut off.
        """
        size = whole.shape
        height = spec.dense_shape[0] // len(self.names)
        blocks = range(first[0], first[0] + size[0]) if spec.stride > 1 else (None,)
        for number, block in enumerate(blocks):
            start, columns = first[0], slice(None)
            part, dims = whole, list(zip(first, size, strict=True))
            if block is not None:
                part, dims = whole[number], dims[1:]
                start = block * spec.shape[1] + first[1]
            if len(dims) > 1:
                columns = slice(dims[1][0], dims[1][0] + dims[1][1])
            rows = slice(start % height, start % height + dims[0][1])
            self._read_rows(stored[self.names[start // height]], rows, columns, part)

    def _read_rows(self, tensor: Stored, rows: slice, columns: slice, part: Tensor) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(tensor.file, "pt") as file:
                view = file.get_slice(tensor.name)
                if part.dim() == 1:
                    part.copy_(view[rows])
                elif self.transposed:
                    part.copy_(view[columns, rows].T)
                else:
                    part.copy_(view[rows, columns])
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{tensor.file} cannot be read: {short(error)}") from None

    def split(self, whole: Tensor) -> list[Tensor]:
        """Their tensors out of ours, of dense_shape."""
        parts = whole.chunk(len(self.names))
        return [part.T.contiguous() if self.transposed else part.contiguous() for part in parts]
