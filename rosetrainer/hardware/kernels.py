"""The kernels that training computes with: torch's, or ours where they are faster here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from rosetrainer.hardware import attention_blocks, layer_norm, measured, onednn

MEASURED = ("linear", "sums")
"""Those of ours that are not faster everywhere."""


def choose_kernels(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """Names of kernels of ours, with commas, or "torch".

    wanted: auto, those that are faster here; ours, all that there are; torch; or such names.
    """
    possible = ["layer_norm"] if device.type == "cpu" else []
    if possible and dtype == torch.bfloat16:
        possible.append("attention")
    if possible and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        possible.extend(MEASURED)
    if wanted == "auto":
        fast = lambda name: name not in MEASURED or measured.machine().is_faster(name)  # noqa: E731
        possible = [name for name in possible if fast(name)]
    elif wanted != "ours":
        possible = [name for name in possible if name in wanted.split(",")]
    return ",".join(possible) or "torch"


@contextmanager
def fast_kernels(dtype: torch.dtype, device: torch.device, wanted: str = "auto") -> Iterator[None]:
    """Training in dtype goes inside: where a kernel of ours is faster, torch calls it meanwhile.

    For the backward pass too, in which recompute computes activations as they were computed.
    wanted: of choose_kernels; torch's own compute everything, as right and at times slower.
    """
    names = choose_kernels(wanted, dtype, device).split(",")
    ours: dict[tuple[Any, str], Any] = {}
    if "layer_norm" in names:
        ours[F, "layer_norm"] = layer_norm.layer_norm
    if "attention" in names:
        ours[F, "scaled_dot_product_attention"] = attention_blocks.attention
    if "linear" in names:
        ours[F, "linear"] = onednn.linear
    if "sums" in names:  # of weights' gradients; and the head's gradient of its input
        ours |= {(torch, "mm"): onednn.mm, (torch.Tensor, "addmm_"): onednn.addmm_}
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
