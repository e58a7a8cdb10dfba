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
Batch = tuple[Tensor, ...]
"""What a model takes, as its forward method names it, and the labels last."""


def micro_batches_of(parallel: ParallelConfig) -> int:
    """Of a rank; in a pipeline more than it has ranks, and a multiple only where it must be."""
    ranks = parallel.pp_size
    if ranks == 1:
        return MICRO_BATCHES
    return 2 * ranks if parallel.pp_schedule == "interleaved" else ranks + 1


def random_batches(config: GPTConfig, context: ParallelContext, seed: int) -> list[Batch]:
    """Global batches, one of full length, then short ones.

    Rows have unequally many labels, the last row none; in the short ones the last dp rank has
    none either, where there are several.
    """
    tp, dp = context.tp, context.dp
    generator = torch.Generator().manual_seed(seed)
    rows = micro_batches_of(context.parallel) * dp.size * ROWS
    short = min(config.context_length, max(SHORT // tp.size, 1) * tp.size)
    batches: list[Batch] = []
    for length in (config.context_length, *[short] * UPDATES):
        shape = (2, rows, length)
        ids, labels = torch.randint(config.vocab_size, shape, generator=generator)
        for row in range(rows):
            labels[row, : row * length // (rows - 1)] = IGNORED
            silent = dp.size > 1 and row // ROWS % dp.size == dp.size - 1
            if batches and silent:
                labels[row] = IGNORED
        whole = (*inputs_of(config, ids, generator), labels)
        batches.append(tuple(tensor.to(context.device) for tensor in whole))
    return batches


def inputs_of(config: GPTConfig, ids: Tensor, generator: torch.Generator) -> Batch:
    """What the model takes for ids (R, T) to be read or, by an encoder-decoder, written."""
    rows, length = ids.shape
    if config.architecture == "glm":
        prefix = (torch.arange(rows)[:, None] % 3 + length // 3).clamp(1, length)  # of part A
        behind = torch.arange(length) - prefix
        span, place = behind // 3, behind % 3 + 1  # the third token of the last one is its end
        of_mask = (7 * span + 2) % prefix
        positions = torch.where(behind < 0, torch.arange(length), of_mask)
        return ids, positions, place.masked_fill(behind < 0, 0)
    if config.architecture != "t5":
        return (ids,)
    source = torch.randint(config.vocab_size, ids.shape, generator=generator)
    lengths = length - torch.arange(rows)[:, None] * length // (2 * rows)  # of at least half
    return source, (torch.arange(length) < lengths).long(), ids


def with_another_end(config: GPTConfig, batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with other tokens from a place of each row on, and which (R, T) stand before it."""
    one_after_the_other = 2 if config.architecture == "t5" else 0
    ids = batch[one_after_the_other]
    rows, length = ids.shape
    odd = torch.arange(1, 2 * rows, 2, device=ids.device)[:, None]
    places = (odd * length // (2 * rows)).clamp(min=1)  # (R, 1)
    before = torch.arange(length, device=ids.device) < places
    if config.architecture == "glm":
        before |= batch[2] == 0  # part A, of which all is seen by all
    others = torch.where(before, ids, (ids + 1) % config.vocab_size)
    return (*batch[:one_after_the_other], others, *batch[one_after_the_other + 1 :]), before
