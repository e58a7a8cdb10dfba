"""The kernels that training computes with: torch's, or ours where they are faster here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from rosetrainer.hardware import attention_blocks, onednn


@contextmanager
def fast_kernels(dtype: torch.dtype, device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Training in dtype goes inside: where a kernel of ours is faster, F calls it meanwhile.

    For the backward pass too, in which recompute computes activations as they were computed.
    Not enabled, torch's own compute everything, as right and at times slower.
    """
    ours: dict[str, Any] = {}
    if enabled and onednn.is_faster(dtype, device):
        ours["linear"] = onednn.linear
    if enabled and dtype == torch.bfloat16 and device.type == "cpu":
        ours["scaled_dot_product_attention"] = attention_blocks.attention
    before = {name: getattr(F, name) for name in ours}
    try:
        for name, kernel in ours.items():
            setattr(F, name, kernel)
        yield
    finally:
        for name, kernel in before.items():
            setattr(F, name, kernel)
