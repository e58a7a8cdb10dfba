"""What a query makes of the keys and values that it may look at, and which those are.

Shape letters: B batch, T queries, S keys and values, H heads, K width of a head; tp = tp.size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from dropout import Dropout, Seed
from parallel_context import Axis
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: Dropout,
    seed: Seed,
    tp: Axis,
) -> Tensor:
    """(B, H/tp, T, K) queries on (B, H/tp, S, K) keys and values -> (B, H/tp, T, K).

    Causal where no mask is given. The fused kernels draw their own dropout masks, so with dropout
    the softmax is written out, (B, H/tp, T, S).
    """
    if seed is None or dropout.p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=wide)
    # Coordinates count from this rank's first head on.
    return dropout(probabilities, seed, (tp.rank * query.shape[1], 0)).to(value.dtype) @ value


def positions_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(T,), or (B, T) where a mask (B, T) says what is padding: it is not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def causal_padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): a query sees the tokens up to itself, padding sees itself.

    Softmax over nothing is nothing: kernels differ in what they make of a row without any key.
    """
    T = attention_mask.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=attention_mask.device)
    return (causal & attention_mask.bool()[:, None, :] | itself)[:, None]
