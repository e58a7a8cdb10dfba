"""The kernels that training computes with: torch's, or ours where they are faster here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from rosetrainer.hardware import attention_blocks, layer_norm, onednn


@contextmanager
def fast_kernels(dtype: torch.dtype, device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Training in dtype goes inside: where a kernel of ours is faster, torch calls it meanwhile.

    For the backward pass too, in which recompute computes activations as they were computed.
    Not enabled, torch's own compute everything, as right and at times slower.
    """
    ours: dict[tuple[Any, str], Any] = {}
    if enabled and onednn.is_faster(dtype, device):
        ours[F, "linear"] = onednn.linear
        # What the head computes the gradients of its input and of its weight by.
        ours |= {(torch, "mm"): onednn.mm, (torch.Tensor, "addmm_"): onednn.addmm_}
    if enabled and device.type == "cpu":
        ours[F, "layer_norm"] = layer_norm.layer_norm
    if enabled and dtype == torch.bfloat16 and device.type == "cpu":
        ours[F, "scaled_dot_product_attention"] = attention_blocks.attention
    with replaced(ours):
        yield


@contextmanager
def replaced(ours: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    """Inside, modules have functions of ours: {(module, name): function}."""
    before = {where: getattr(*where) for where in ours}
    try:
        for where, function in ours.items():
            setattr(*where, function)
        yield
    finally:
        for where, function in before.items():
            setattr(*where, function)
