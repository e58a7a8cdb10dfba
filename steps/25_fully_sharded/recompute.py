"""Activations that are computed twice instead of kept.

"Training Deep Nets with Sublinear Memory Cost" (Chen et al.); the attention alone: "Reducing
Activation Recomputation in Large Transformer Models" (Korthikanti et al.).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from parallel_context import Axis
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Any, enabled: bool, tp: Axis) -> Any:
    """function(*inputs). If enabled, backward keeps the inputs alone and runs it once more.

    It must do the same again, which dropout by coordinates does without any generator's state.
    Its collectives run again too, up to the last tensor that backward needs; the ledger counts
    them as recompute.
    """
    if not enabled:
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), tp.ledger.recomputing()),
    )
