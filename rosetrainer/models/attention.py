"""What a query makes of the keys and values that it may look at, and which those are.

Shape letters: B batch, T queries, S keys and values, H heads, K width of a head; tp = tp.size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rosetrainer.parallel.context import Axis
from rosetrainer.parallel.dropout import Dropout, Seed

BLOCK = 128  # queries whose scores are made at once
KEPT = 512  # queries, and no more, whose shares are kept for backward: they grow with T x T


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
        if mask is None and query.device.type == "cpu" and query.dtype == torch.bfloat16:
            return CausalBlocks.apply(query, key, value)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    wide = torch.promote_types(scores.dtype, torch.float32)
    shares = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=wide)
    # Coordinates count from this rank's first head on.
    return dropout(shares, seed, (tp.rank * query.shape[1], 0)).to(value.dtype) @ value


class CausalBlocks(torch.autograd.Function):
    """Causal attention by matrix products: BLOCK queries at a time, on the keys up to theirs.

    (B, H, T, K) queries, keys and values -> (B, H, T, K), in memory (B, T, H, K), as the next
    layer reads it. torch's kernel for CPUs is slow in bf16, its backward most of all. Beyond KEPT
    queries backward makes the shares again, as in "FlashAttention" (Dao et al.): what is kept then
    grows with T, not with T x T.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        B, H, T, K = inputs[0].shape
        query, key, value = (x.contiguous().flatten(0, 1) for x in inputs)  # (B*H, T, K)
        heads = query.new_empty(B, T, H, K).transpose(1, 2)
        kept = []
        for start, stop in blocks(T):
            # A product of many matrices copies what is not contiguous, slowly if transposed.
            own, seen = query[:, start:stop].contiguous(), key[:, :stop].contiguous()
            share = shares(own, seen)
            heads[:, :, start:stop] = (share @ value[:, :stop]).unflatten(0, (B, H))
            if T <= KEPT:
                kept.append(share)
        ctx.save_for_backward(query, key, value, *kept)
        return heads

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *kept = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)  # where blocks add up
        query_grad = torch.empty_like(query)
        key_grad, value_grad = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        whole, scale = upstream.contiguous().flatten(0, 1), 1 / math.sqrt(query.shape[-1])
        for start, stop in blocks(query.shape[1]):
            own, grad = (x[:, start:stop].contiguous() for x in (query, whole))
            seen, values = (x[:, :stop].contiguous() for x in (key, value))
            share = kept[start // BLOCK] if kept else shares(own, seen)  # (B*H, n, stop)
            of_share = grad @ values.mT
            of_score = torch._softmax_backward_data(of_share, share, -1, share.dtype)
            value_grad[:, :stop].add_(share.mT @ grad)  # += would also copy it onto itself
            key_grad[:, :stop].add_(of_score.mT @ own)
            query_grad[:, start:stop].baddbmm_(of_score, seen, beta=0, alpha=scale)
        grads = (query_grad, key_grad.mul_(scale), value_grad)
        return tuple(x.to(query.dtype).unflatten(0, upstream.shape[:2]) for x in grads)


def blocks(T: int) -> list[tuple[int, int]]:
    """(first query, the one behind the last) of each block; the last may be shorter."""
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def shares(own: Tensor, seen: Tensor) -> Tensor:
    """(B*H, n, stop): what each of a block's n queries takes of the keys up to itself.

    own: (B*H, n, K) queries; seen: (B*H, stop, K) keys, of which the last n are the block's.
    """
    n, scale = own.shape[1], 1 / math.sqrt(own.shape[-1])
    scores = own.new_empty(len(own), n, seen.shape[1])  # beta=0: nothing of it is read
    scores.baddbmm_(own, seen.mT, beta=0, alpha=scale)
    scores[..., -n:].add_(own.new_full((n, n), -math.inf).triu_(1))
    return scores.softmax(-1)  # in fp32 inside, rounded once


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
