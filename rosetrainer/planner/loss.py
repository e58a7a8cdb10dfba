"""What output head and loss move, and hold at their peak, in chunks.

Letters: N tokens, D d_model, V a rank's rows of the table, C tokens of a chunk; e bytes of a number
in a product, w of one in the loss. Bytes of what is made from the head's input, table and labels
until both gradients are there. They hold where the logits are what is large: N > D, and C x V as
much as N x D. Under sequence parallelism the gathered input is N x D x e more.
"""

from __future__ import annotations

from rosetrainer.parallel.vocab_parallel import rows_of_a_chunk


def bytes_of_sums(N: int, V: int, e: int) -> list[int]:
    """Of each chunk the largest logits; then the sums of exponentials and the labels' logits."""
    w = max(e, 4)
    rows = rows_of_a_chunk(V, w)
    chunks = [min(rows, N - first) for first in range(0, N, rows)]
    return [size * w for chunk in chunks for size in (chunk, 2 * chunk)]


def bytes_in_chunks(N: int, D: int, V: int, e: int = 4) -> int:
    """Both gradients, one chunk, and labels, probabilities and losses of all tokens."""
    w = max(e, 4)
    C = min(rows_of_a_chunk(V, w), N)
    held = N * D * e + V * D * w + N * (1 + 8 + 2 * w)
    if e == w:
        return held + C * V * w + C * (2 + 8 + 4 * w)  # while the label's logit gets its gradient
    # Copies of input and table in the product's dtype; a chunk's gradient is cast to it.
    return held + (N + V) * D * e + C * V * (w + e)
