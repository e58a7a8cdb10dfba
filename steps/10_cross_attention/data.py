"""Lines to be reversed: the source is a line of letters, the target the same line from its end."""

from __future__ import annotations

import torch
from config import IGNORED
from torch import Tensor

PADDING, BEGIN, END, LETTERS = 0, 1, 2, 10  # the ids from 3 on are letters
SHORTEST, LONGEST = 4, 10


def lines(seed: int, rows: int, held_out: bool = False) -> tuple[Tensor, ...]:
    """(source_ids, target_ids, source_mask, target_mask, labels), each (rows, LONGEST + 1).

    A line is held out, never trained on, if its letters add up to a multiple of five.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, 3 + LETTERS, (20 * rows, LONGEST + 1), generator=generator)
    ends = torch.randint(SHORTEST, LONGEST + 1, (20 * rows, 1), generator=generator)
    place = torch.arange(LONGEST + 1)
    letters = drawn.masked_fill(place >= ends, PADDING)
    wanted = ((letters.sum(1) % 5 == 0) == held_out).nonzero()[:rows, 0]
    source, ends = letters[wanted], ends[wanted]
    labels = source.gather(1, (ends - 1 - place).clamp(min=0))
    labels = labels.masked_fill(place == ends, END).masked_fill(place > ends, IGNORED)
    target = labels.roll(1, dims=1).masked_fill(place > ends, PADDING)
    target[:, 0] = BEGIN
    return source, target, (source != PADDING).long(), (place <= ends).long(), labels
