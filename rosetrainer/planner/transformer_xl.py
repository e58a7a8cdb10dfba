"""What a rank holds of Transformer-XL's attention, which is written out, by content and distance.

Letters: B rows of a micro-batch, T tokens, D d_model; for a rank h heads.
"""

from __future__ import annotations

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.planner.shares import Work


def bytes_of_attention(model: GPTConfig, parallel: ParallelConfig, work: Work) -> int:
    """What one layer keeps besides its input."""
    B, T, e, m = work.rows, work.tokens, work.product_bytes, work.weight_bytes
    h = model.n_heads // (parallel.tp_size or 1)
    heads = T * h * model.head_width
    fused = 3 * B * heads * e  # which keys and values are views of
    if parallel.recompute == "attention":
        return 2 * B * heads * max(e, m) + fused + heads * e + B * heads * e
    # A product of many matrices copies what is not contiguous; of one row nothing is copied.
    keys_and_values = fused if B == 1 else 2 * B * heads * e
    total = keys_and_values + (2 + 1 + 1) * B * heads * e  # two of queries, distances, the result
    # Probabilities; after dropout, and which were dropped; else only in another dtype once more.
    again = e + 1 if model.dropout else e * (e < 4)
    return total + B * h * T * T * (max(e, 4) + again) + T * T  # and which keys are hidden


def bytes_of_distances(model: GPTConfig, parallel: ParallelConfig, work: Work, layers: int) -> int:
    """The table, which all layers share, unless each casts it."""
    e, wide = work.product_bytes, max(work.weight_bytes, 4)
    table = work.tokens * model.d_model
    if e == wide or parallel.recompute == "block":
        return table * wide * (layers > 0)
    return layers * table * e


def weights_of_distances(model: GPTConfig, parallel: ParallelConfig) -> int:
    """How many numbers one layer's projection of distances has."""
    return model.n_heads // (parallel.tp_size or 1) * model.head_width * model.d_model
