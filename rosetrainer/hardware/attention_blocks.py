"""Causal attention in bf16 on a CPU, where torch's kernel is slow, its backward most of all.

Shape letters: B batch, T sequence, H heads, K width of a head; n queries of one block, stop the
keys up to its last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries whose scores are computed at once
MAX_SAVED_QUERIES = 512  # up to here probabilities are saved for backward: they grow with T x T
TORCHS_ATTENTION = F.scaled_dot_product_attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """As F.scaled_dot_product_attention: (B, H, T, K) each -> (B, H, T, K)."""
    if is_causal and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return CausalBlocks.apply(query, key, value)
    return TORCHS_ATTENTION(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


class CausalBlocks(torch.autograd.Function):
    """Causal attention by matrix products: BLOCK queries at a time, on the keys up to theirs.

    (B, H, T, K) queries, keys and values -> (B, H, T, K), in memory (B, T, H, K), as the next
    layer reads it. Beyond MAX_SAVED_QUERIES backward computes the probabilities again, as in
    "FlashAttention" (Dao et al.): what is saved then grows with T, not with T x T.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        B, H, T, K = inputs[0].shape
        query, key, value = (x.contiguous().flatten(0, 1) for x in inputs)  # (B*H, T, K)
        heads = query.new_empty(B, T, H, K).transpose(1, 2)
        saved = []
        for start, stop in blocks(T):
            # A product of many matrices copies what is not contiguous, slowly if transposed.
            own, seen = query[:, start:stop].contiguous(), key[:, :stop].contiguous()
            block = probabilities(own, seen)
            heads[:, :, start:stop] = (block @ value[:, :stop]).unflatten(0, (B, H))
            if T <= MAX_SAVED_QUERIES:
                saved.append(block)
        ctx.save_for_backward(query, key, value, *saved)
        return heads

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *saved = ctx.saved_tensors
        whole, T = upstream.contiguous().flatten(0, 1), query.shape[1]
        if T <= BLOCK:  # nothing to add up
            grads = gradients_of_block(query, key, value, saved[0], whole)
            return tuple(x.unflatten(0, upstream.shape[:2]) for x in grads)
        wide = torch.promote_types(query.dtype, torch.float32)  # where blocks add up
        query_grad = torch.empty_like(query)
        key_grad, value_grad = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for start, stop in blocks(T):
            own, grad = (x[:, start:stop].contiguous() for x in (query, whole))
            seen, values = (x[:, :stop].contiguous() for x in (key, value))
            block = saved[start // BLOCK] if saved else probabilities(own, seen)  # (B*H, n, stop)
            of_own, of_seen, of_values = gradients_of_block(own, seen, values, block, grad)
            query_grad[:, start:stop] = of_own
            key_grad[:, :stop].add_(of_seen)  # += would also copy it onto itself
            value_grad[:, :stop].add_(of_values)
        grads = (query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype))
        return tuple(x.unflatten(0, upstream.shape[:2]) for x in grads)


def blocks(T: int) -> list[tuple[int, int]]:
    """(first query, the one behind the last) of each block; the last may be shorter."""
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def probabilities(own: Tensor, seen: Tensor) -> Tensor:
    """(B*H, n, stop): the softmax of a block's n queries over the keys up to each.

    own: (B*H, n, K) queries; seen: (B*H, stop, K) keys, of which the last n are the block's.
    """
    n, scale = own.shape[1], 1 / math.sqrt(own.shape[-1])
    scores = own.new_empty(len(own), n, seen.shape[1])  # beta=0: nothing of it is read
    scores.baddbmm_(own, seen.mT, beta=0, alpha=scale)
    scores[..., -n:].add_(own.new_full((n, n), -math.inf).triu_(1))
    return scores.softmax(-1)  # in fp32 inside, rounded once


def gradients_of_block(
    own: Tensor, seen: Tensor, values: Tensor, block: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block's queries, and what it adds to those of the keys and values that it sees.

    block: their probabilities; grad: (B*H, n, K), of what it makes of them.
    """
    scale = 1 / math.sqrt(own.shape[-1])
    of_score = torch._softmax_backward_data(grad @ values.mT, block, -1, block.dtype)
    of_own = torch.empty_like(own).baddbmm_(of_score, seen, beta=0, alpha=scale)
    of_seen = torch.empty_like(seen).baddbmm_(of_score.mT, own, beta=0, alpha=scale)
    return of_own, of_seen, block.mT @ grad
