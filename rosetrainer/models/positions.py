"""Rotary positions: queries and keys are turned by angles that tell how far apart they stand.

"RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al.).
Shape letters: B batch, T sequence, H heads, K width of a head; tp = tp.size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosetrainer.config import GPTConfig


def rotary_angles(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """(.., T) positions -> (.., T, 3, 1, K/2), complex numbers by which q, k and v are multiplied.

    Pair i of a head turns by position x base^(-2i/K); the third part, of values, does not turn.
    """
    K = config.head_width
    pairs = torch.arange(0, K, 2, dtype=torch.float64, device=positions.device)
    speeds = config.rotary_base ** (-pairs / K)  # (K/2,)
    whose = torch.tensor([1.0, 1.0, 0.0], device=positions.device)
    angles = positions[..., None, None, None] * whose[:, None, None] * speeds
    numbers = torch.polar(torch.ones_like(angles), angles)
    return numbers if dtype == torch.float64 else numbers.to(torch.complex64)


def apply_rotary(fused: Tensor, angles: Tensor) -> Tensor:
    """(B, T, 3, H/tp, K) -> that shape, in fp32 or better: neighbours 2i and 2i+1 turned as one
    complex number."""
    wide = fused.to(torch.promote_types(fused.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (B, T, 3, H/tp, K/2)
    return torch.view_as_real(pairs * angles).flatten(-2)


def turning(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """(.., T) positions -> (2, .., T, 1, R/2): cosine and sine of the angle by which each pair of a
    head turns, in fp32 or better. R is config.rotary_width, and pair i turns by position x
    base^(-2i/R).
    """
    R = config.rotary_width
    pairs = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None, None] * config.rotary_base ** (-pairs / R)
    return torch.stack([angles.cos(), angles.sin()]).to(torch.promote_types(dtype, torch.float32))


def turn(x: Tensor, angles: Tensor, pairs: str) -> Tensor:
    """(B, T, heads, K) -> that shape: the first R features of each head turned, the others as they
    are. Feature i turns with i + R/2 if pairs are "halves", 2i with 2i+1 if they are "neighbours".
    angles: of `turning`.
    """
    cosine, sine = angles.unbind()  # (T, 1, R/2) or (B, T, 1, R/2)
    R, dim = 2 * cosine.shape[-1], -2 if pairs == "halves" else -1
    sizes = (2, -1) if pairs == "halves" else (-1, 2)
    a, b = x[..., :R].unflatten(-1, sizes).unbind(dim)  # (B, T, heads, R/2) each
    turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim).flatten(-2)
    return turned if R == x.shape[-1] else torch.cat([turned, x[..., R:]], dim=-1)
