"""Batches of a corpus that `prepare` wrote: which tokens make up each row of each step.

Shape letters: R rows of a batch, T context_length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rosetrainer.config import IGNORED
from rosetrainer.data.advice import damaged
from rosetrainer.data.corpus import CorpusMeta, load_tokenizer, read_meta
from rosetrainer.data.markov import Floats, MarkovChain
from rosetrainer.data.token_file import Int64s, TokenFile
from rosetrainer.data.tokenizer import Tokenizer
from rosetrainer.validation import ConfigError


class Corpus:
    """Batches of a corpus that open_corpus has checked."""

    def __init__(self, folder: Path, meta: CorpusMeta, files: list[TokenFile], context: int):
        self.folder, self.meta, self.context_length = folder, meta, context
        self._train, self._val = files
        self._labels = meta.train_tokens - 1
        self._windows = self._labels // context  # of an epoch

    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError if it cannot be read."""
        return load_tokenizer(self.folder, vars(self.meta))

    def train_batch(
        self, seed: int, step: int, global_batch_size: int, rows: range
    ) -> tuple[Int64s, ...]:
        """Inputs and labels (R, T) of some rows of the batch of a step, counted from 0.

        A row's content follows from (seed, step x global_batch_size + row) alone: it is the same
        in every layout, and after a resume. An epoch is as many windows as the labels fill, in a
        random order, laid side by side from where the epoch before ended; after the last label
        comes the first, whose input is the first token. So after any number of epochs the counts
        of two labels differ by one at most, and within an epoch by two. Where the windows leave no
        rest, each epoch begins at a random place and the counts are equal.
        """
        assert rows.start >= 0, rows
        assert rows.stop <= global_batch_size, (rows, global_batch_size)
        inputs, labels = (np.empty((len(rows), self.context_length), np.int64) for _ in range(2))
        for i, row in enumerate(rows):
            epoch, position = divmod(step * global_batch_size + row, self._windows)
            start, order = _epoch(seed, epoch, self._labels, self.context_length)
            place, filled = start + int(order[position]) * self.context_length, 0
            while filled < self.context_length:  # in one piece, or in two around the end
                place %= self._labels
                count = min(self.context_length - filled, self._labels - place)
                tokens = self._train.read(place, count + 1, self.meta.vocab_size)
                piece = slice(filled, filled + count)
                inputs[i, piece], labels[i, piece] = tokens[:-1], tokens[1:]
                place, filled = place + count, filled + count
        return inputs, labels

    def val_batches(
        self, tokens: int | None, batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Iterator[tuple[Any, ...]]:
        """Inputs, labels and floors (batch_size, T) of this rank: the first labels of val.bin.

        tokens: so many of them, None for all; they are cut to whole windows, at least one. Over the
        ranks, each label comes once. Every rank gets the same number of batches; rows (or whole
        batches) beyond the last window hold label IGNORED everywhere. A floor is the true chain's
        loss of a label in nats, 0 where there is no label or the corpus has no floor.
        """
        length, labels_in_all = self.context_length, self.meta.val_tokens - 1
        wanted = min(tokens, labels_in_all) if tokens else labels_in_all
        end = max(wanted // length, 1) * length
        batches = -(-end // (length * batch_size * dp_size))
        for rows in rows_of_rank(dp_rank, dp_size, batches, batch_size):
            inputs = np.zeros((batch_size, length), np.int64)
            labels, floors = np.full_like(inputs, IGNORED), np.zeros(inputs.shape)
            starts = range(min(rows.start * length, end), min(rows.stop * length, end), length)
            for row, start in enumerate(starts):
                window = self._val.read(start, length + 1, self.meta.vocab_size)
                inputs[row], labels[row] = window[:-1], window[1:]
                if self.has_floor:
                    floors[row] = self._floor[start : start + length]
            yield inputs, labels, floors

    @property
    def has_floor(self) -> bool:
        return self.meta.chain is not None

    @cached_property
    def _floor(self) -> Floats:
        assert self.meta.chain is not None, f"{self.folder} has no floor"
        chain = MarkovChain(self.meta.chain["order"], np.array(self.meta.chain["probabilities"]))
        return chain.label_losses(self._val.read(0, self.meta.val_tokens, self.meta.vocab_size))


def rows_of_rank(rank: int, ranks: int, batches: int, size: int) -> Iterator[range]:
    """The rows of each of a data-parallel rank's `batches` of `size` rows in the global batch.

    The first batches of all ranks are the first rows, in order of rank; then come the second ones.
    """
    for index in range(batches):
        first = (index * ranks + rank) * size
        yield range(first, first + size)


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def _epoch(seed: int, epoch: int, labels: int, length: int) -> tuple[int, Int64s]:
    """The label at which the epoch begins, and the order of its windows.

    From Philox's raw numbers (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3"), which
    numpy promises not to change, as it does not for Generator.permutation.
    """
    windows, rest = divmod(labels, length)
    generator = _philox(seed, epoch)
    start = int(generator.random_raw())
    order = np.argsort(generator.random_raw(windows), kind="stable")
    if rest:  # it goes on where the epoch before ended, and so the borders of the windows move
        start = int(_philox(seed, 0).random_raw()) + epoch * windows * length
    return start % labels, order


def _philox(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], np.uint64))


def open_corpus(folder: Path, context_length: int, read_all: bool = True) -> Corpus:
    """The corpus in folder, for windows of context_length tokens and one label more.

    read_all: look at every byte once, which one rank of a machine has to do. Raises ConfigError
    if a file is missing, damaged, or too short.
    """
    meta = read_meta(folder)
    remedy = damaged(folder, meta.source, meta.options)
    files = [TokenFile(folder / name, remedy, meta.dtype) for name in ("train.bin", "val.bin")]
    counts = (meta.train_tokens, meta.val_tokens)
    for file, tokens in zip(files, counts, strict=True):
        if read_all:
            name = file.path.name
            blocks = meta.blocks[name] if meta.blocks else None
            file.check(tokens, meta.vocab_size, meta.sha256[name], blocks)
    for file, tokens in zip(files, counts, strict=True):
        if tokens < context_length + 1:
            longest = min(counts) - 1
            raise ConfigError(
                f"{file.path} has {tokens} tokens, too few for context_length={context_length}, "
                f"which takes {context_length + 1}; "
                + (f"context_length can be 1 to {longest}" if longest else "take a longer text")
            )
    return Corpus(folder, meta, files, context_length)
