"""What attention keeps for its backward pass besides its inputs and result, on a CPU's kernels.

Letters: B rows, H heads of a rank, T queries, S keys; e bytes of a number in a product.
"""

from __future__ import annotations

from rosetrainer.hardware.attention_blocks import MAX_SAVED_QUERIES, blocks


def bytes_of_scores(
    B: int, H: int, T: int, S: int, e: int, mask_rows: int = 0, dropout: bool = False
) -> int:
    """The bytes of one layer's attention, one micro-batch.

    mask_rows: rows of the padding mask (B, 1, mask_rows, S); 0 where attention is causal.
    """
    mask = B * mask_rows * S
    if dropout:  # written out: probabilities, those after dropout, which were dropped; and the mask
        return B * H * T * S * (max(e, 4) + e + 1) + (mask or T * S)
    if mask_rows or e != 2:  # the fused kernel: a logarithm for each query, the mask as numbers
        return B * H * T * max(e, 4) + mask * e
    if T > MAX_SAVED_QUERIES:
        return 0
    # In blocks of queries: the probabilities of each over the keys up to its last.
    return B * H * sum((stop - start) * stop for start, stop in blocks(T)) * e
