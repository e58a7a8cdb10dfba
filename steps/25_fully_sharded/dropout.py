"""Dropout whose masks belong to the global tensor: the same in every layout, on CPU and CUDA.

"Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (Srivastava et al.). A mask is
no draw from a generator: each element's fate is a hash of (seed, step, site, global coordinates),
counter-based as in "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al.). The mixer is
that of "Fast Splittable Pseudorandom Number Generators" (Steele, Lea and Flood).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# As signed numbers, for int64 is what torch computes with; products wrap around as they should.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class DropoutSeed:
    """Where in a run a batch stands: with the site, all that its masks depend on."""

    seed: int
    step: int
    first_row: int = 0  # the number of the batch's first sample in the step's global batch


Seed = DropoutSeed | None  # None where nothing is dropped, as in evaluation


class Dropout(nn.Module):
    """Zeroes each element with probability p, and scales the others so that the mean stays.

    `site` is the module's name in the model, so layers differ; name_sites gives it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.site = p, ""

    def forward(self, x: Tensor, seed: Seed, first: tuple[int, ...]) -> Tensor:
        """x: (B, .., n), a block of the global tensor that begins, without B and n, at `first`.

        The last dimension is whole.
        """
        if seed is None or self.p == 0:
            return x
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2**16
        text = f"{seed.seed}:{seed.step}:{self.site}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
        lanes = hash_lanes(tuple(x.shape), (seed.first_row, *first), key, x.device)
        return x.masked_fill(lanes < dropped - 2**15, 0) * (2**16 / (2**16 - dropped))


def hash_lanes(
    shape: tuple[int, ...], first: tuple[int, ...], key: int, device: torch.device
) -> Tensor:
    """An int16, uniform, for each element of a block of `shape` that begins at `first`.

    One hash of 64 bits holds four of them, for four neighbours.
    """
    bits = torch.full((), key, dtype=torch.int64, device=device)
    for size, start in zip((*shape[:-1], -(-shape[-1] // 4)), (*first, 0), strict=True):
        index = torch.arange(start + 1, start + size + 1, device=device)
        bits = mix(bits[..., None] + index * GOLDEN)
    return bits.view(torch.int16)[..., : shape[-1]]


def mix(bits: Tensor) -> Tensor:
    """An int64 in which every bit depends on every bit of the old one; in place."""
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        bits ^= (bits >> shift) & ((1 << (64 - shift)) - 1)  # a shift that brings in zeros
        bits *= factor
    return bits


def name_sites(model: nn.Module) -> None:
    """Tells each dropout of the model its name there, the same in every layout."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = name
