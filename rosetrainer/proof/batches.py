"""The random batches of a proof, which are as uneven as batches can be.

Shape letters: R rows of the global batch, T tokens that are proven.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosetrainer.config import IGNORED, GPTConfig, ParallelConfig
from rosetrainer.parallel.context import ParallelContext

SHORT = 32  # tokens of the updates after the first
MICRO_BATCHES, ROWS, UPDATES = 2, 2, 3  # of a rank, of a micro-batch, of the optimizer


def micro_batches_of(parallel: ParallelConfig) -> int:
    """Of a rank; in a pipeline more than it has ranks, and a multiple only where it must be."""
    ranks = parallel.pp_size
    if ranks == 1:
        return MICRO_BATCHES
    return 2 * ranks if parallel.pp_schedule == "interleaved" else ranks + 1


def random_batches(
    config: GPTConfig, context: ParallelContext, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Global batches (R, T), one of full length, then short ones.

    Rows have unequally many labels, the last row none; in the short ones the last dp rank has
    none either, where there are several.
    """
    tp, dp = context.tp, context.dp
    generator = torch.Generator().manual_seed(seed)
    rows = micro_batches_of(context.parallel) * dp.size * ROWS
    short = min(config.context_length, max(SHORT // tp.size, 1) * tp.size)
    batches: list[tuple[Tensor, Tensor]] = []
    for length in (config.context_length, *[short] * UPDATES):
        shape = (2, rows, length)
        ids, labels = torch.randint(config.vocab_size, shape, generator=generator)
        for row in range(rows):
            labels[row, : row * length // (rows - 1)] = IGNORED
            silent = dp.size > 1 and row // ROWS % dp.size == dp.size - 1
            if batches and silent:
                labels[row] = IGNORED
        batches.append((ids.to(context.device), labels.to(context.device)))
    return batches
