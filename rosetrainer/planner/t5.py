"""What a rank holds of T5, whose self-attention is written out, with a bias for each distance.

Letters: B rows of a micro-batch, L tokens of a side, S of the source, T of the target, D d_model;
for a rank h heads.
"""

from __future__ import annotations

from dataclasses import replace

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.planner import llama
from rosetrainer.planner.attention import bytes_of_scores
from rosetrainer.planner.shares import Work


def activations(
    model: GPTConfig, parallel: ParallelConfig, work: Work, own: int, gathered: int
) -> int:
    """Bytes that one micro-batch keeps before the output head. own, gathered: over how many ranks
    the stream is divided, and the inputs of column-parallel layers."""
    B, S, T, m = work.rows, work.source_tokens, work.tokens, work.weight_bytes
    layers, h = model.n_layers, model.n_heads // (parallel.tp_size or 1)
    memory = B * S * model.d_model
    total = 0
    for L, rows in ((S, B), (T, 1)):
        side = replace(work, tokens=L)
        total += (
            B * L * (8 + 1) + L * L * 8
        )  # ids, whether this rank has their row; kinds of distances
        total += bool(model.dropout) * B * L // own * model.d_model
        total += llama.bytes_of_norm(model, side, own)
        if parallel.recompute != "none":
            total += rows * h * L * L * m  # the bias, with -inf where nothing is seen
        if parallel.recompute == "block":
            total += layers * B * L // own * model.d_model * m
        else:
            block = llama.bytes_around_attention(model, parallel, side, own, gathered)
            total += layers * (block + bytes_of_self_attention(model, parallel, side))
    if parallel.recompute != "none":
        total += layers * B * S  # which source tokens are no padding, for each layer anew
    if parallel.recompute == "block":
        return total + memory // own * m
    total += layers * bytes_of_cross_attention(model, parallel, work, own, gathered)
    # All layers look at one encoded source; each keeps it alone only where it gathered it.
    alone = gathered != own or work.product_bytes != m
    return total + (layers if alone else 1) * memory // gathered * work.product_bytes


def bytes_of_self_attention(model: GPTConfig, parallel: ParallelConfig, work: Work) -> int:
    B, T, e, m = work.rows, work.tokens, work.product_bytes, work.weight_bytes
    h = model.n_heads // (parallel.tp_size or 1)
    width = h * model.head_width
    total = 3 * width * model.d_model * m * (e == m)  # as llama's
    total += 4 * B * T * width * e  # queries, keys, values, result
    if parallel.recompute == "attention":
        return total
    # Probabilities; after dropout, and which were dropped; else only in another dtype once more.
    again = e + 1 if model.dropout else e * (e < 4)
    return total + B * h * T * T * (max(e, 4) + again)


def bytes_of_cross_attention(
    model: GPTConfig, parallel: ParallelConfig, work: Work, own: int, gathered: int
) -> int:
    """Without the source."""
    B, S, T, D = work.rows, work.source_tokens, work.tokens, model.d_model
    h, e = model.n_heads // (parallel.tp_size or 1), work.product_bytes
    dropout = bool(model.dropout)
    total = llama.bytes_of_norm(model, work, own) + B * T // gathered * D * e
    total += dropout * B * T // own * D
    total += B * (2 * T + 2 * S) * h * model.head_width * e  # queries, keys, values, result
    if parallel.recompute == "none":
        total += bytes_of_scores(B, h, T, S, e, 1, dropout)
    return total
