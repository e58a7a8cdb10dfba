"""A corpus whose true loss is known: a random chain, in which the last token decides the next.

No model can do better than the chain itself, so its own loss is a floor: a validation loss that
ends above it still has something to learn, and one that ends under it has seen its labels.
"""

from __future__ import annotations

import torch
from config import IGNORED
from torch import Tensor


class MarkovCorpus:
    """Tokens drawn from a chain over `alphabet` letters; floor: its mean loss on `val`, in nats."""

    def __init__(self, alphabet: int = 8, train_tokens: int = 100_000, val_tokens: int = 8_193):
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(alphabet, alphabet, generator=generator) ** 4 + 1e-3
        self.alphabet = alphabet
        self.chain = weights / weights.sum(1, keepdim=True)  # row: the token before
        tokens = [0]
        draws = torch.multinomial(self.chain, train_tokens + val_tokens, True, generator=generator)
        for drawn_after in draws.T.tolist():  # one draw after each letter; the last token picks
            tokens.append(drawn_after[tokens[-1]])
        self.train = torch.tensor(tokens[:train_tokens])
        self.val = torch.tensor(tokens[train_tokens:])
        self.floor = -self.chain[self.val[:-1], self.val[1:]].log().mean().item()

    def batch(self, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """(input_ids, labels), each (rows, length), of a step: it depends on the step alone.

        Rows hold unequally many tokens, as real text does: the labels after a row's end are -100.
        """
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.train) - length, (rows, 1), generator=generator)
        input_ids, labels = shifted(self.train[starts + torch.arange(length + 1)])
        ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
        return input_ids, labels.masked_fill(torch.arange(length) >= ends, IGNORED)

    def validation(self, length: int) -> tuple[Tensor, Tensor]:
        """(input_ids, labels) of all windows of `val`, side by side."""
        windows = (len(self.val) - 1) // length
        return shifted(self.val[torch.arange(windows)[:, None] * length + torch.arange(length + 1)])


def shifted(window: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> input_ids and labels (B, T): the label of a token is the one after it."""
    return window[:, :-1], window[:, 1:]
