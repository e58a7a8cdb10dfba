"""bf16 where it multiplies, fp32 where it adds up.

"Mixed Precision Training" (Micikevicius et al.): weights, gradients and Adam's moments stay fp32,
matrix products run in a short dtype. bf16 has fp32's range, so it needs no loss scale.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

Autocast = Callable[[], AbstractContextManager[object]]


def autocast_for(dtype: torch.dtype, device: torch.device) -> Autocast:
    """Makes a context in which fp32 parameters multiply in bf16; for other dtypes it does nothing.

    Norms, softmax, the residual stream and the loss stay in fp32 there.
    """
    if dtype != torch.bfloat16:
        return nullcontext
    return partial(torch.autocast, device.type, dtype)
