"""What a rank holds of the Llama family, by the choices that it is made of.

Letters as in layout.py, for a rank: h query heads, g heads of keys and values, K width of a head.
"""

from __future__ import annotations

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.planner.attention import bytes_of_scores
from rosetrainer.planner.shares import Work, heads


def bytes_of_norm(model: GPTConfig, work: Work, own: int) -> int:
    """Its input, and for each token mean and deviation; of rmsnorm also what it has normed."""
    is_rms, D = model.norm in (None, "rmsnorm"), model.d_model
    each = 2 * D + 1 if is_rms else D + 2
    return work.rows * work.tokens // own * each * work.weight_bytes


def bytes_of_block(
    model: GPTConfig, parallel: ParallelConfig, work: Work, own: int, gathered: int
) -> int:
    """What one block keeps that is not recomputed whole."""
    K, D = model.head_width, model.d_model
    e, m, tokens = work.product_bytes, work.weight_bytes, work.rows * work.tokens
    h, g = heads(model, parallel.tp_size or 1)
    total = bytes_around_attention(model, parallel, work, own, gathered)
    fused = tokens * (h + 2 * g) * K * e
    total += (h + 2 * g) * K * D * m * (e == m)  # the weights side by side; else see weight_copies
    again = parallel.recompute == "attention"
    dropout = bool(model.dropout)
    # Values lie in the fused product, unless each query head has its copy or dropout makes one.
    values_lie_there = again or (h == g and not dropout)
    keys = tokens * (g if again else h) * K * e
    values = 0 if values_lie_there else tokens * h * K * e
    total += 2 * tokens * h * K * e + keys + values  # queries and the result, keys, values
    total += fused * (values_lie_there or model.qk_norm)
    if model.qk_norm:  # as for a norm of the stream, whose input is the fused product
        total += tokens * (h + g) * (K + 1) * max(m, 4)
    if not again:
        T = work.tokens
        total += bytes_of_scores(work.rows, h, T, T, e, dropout=dropout)
    return total


def bytes_around_attention(
    model: GPTConfig, parallel: ParallelConfig, work: Work, own: int, gathered: int
) -> int:
    """Two norms, the inputs of attention and feed-forward layer, and this one."""
    tokens, D, e = work.rows * work.tokens, model.d_model, work.product_bytes
    total = 2 * bytes_of_norm(model, work, own) + 2 * tokens // gathered * D * e
    total += bool(model.dropout) * 2 * tokens // own * D  # which were dropped, one byte each
    features = tokens * model.ff_width // (parallel.tp_size or 1) * e
    if model.is_gated:
        return total + 4 * features  # gate and up, the gate's function, the product
    return total + (1 if model.function == "relu" else 2) * features


def bytes_of_angles(model: GPTConfig, work: Work) -> int:
    """Cosines and sines, which all blocks share."""
    return work.tokens * model.rotary_width * max(work.weight_bytes, 4)
