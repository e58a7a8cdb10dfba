"""The objective of BERT: some tokens of a text are hidden, and the model says which they were.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (Devlin et al.).
Shape letters: R rows of a batch, T context_length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from rosetrainer.config import IGNORED, GPTConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.data.token_file import Int64s
from rosetrainer.validation import ConfigError

ASKED = 0.15  # of a row's tokens, at least one
EVALUATION = 2**63  # in place of the seed and above every one: its masks are always the same


class ObjectiveCorpus(Corpus):
    """The windows of a corpus, of which something else is asked: no floor is known, nor bytes.

    What is asked of a window follows from a seed and the window's number among all of that seed.
    window: their tokens, context_length unless given.
    """

    def __init__(self, corpus: Corpus, window: int | None = None) -> None:
        plain = replace(corpus.meta, bytes_per_token=None, chain=None, floor_nats=None)
        files = [corpus._train, corpus._val]
        super().__init__(corpus.folder, plain, files, window or corpus.context_length)

    def asked(self, windows: Int64s, seed: int, numbers: Sequence[int]) -> tuple[Int64s, ...]:
        """(R, T) windows -> inputs, what else the model reads, labels. numbers: of each row."""
        raise NotImplementedError

    def train_batch(
        self, seed: int, step: int, global_batch_size: int, rows: range
    ) -> tuple[Int64s, ...]:
        """As `asked` gives it, for the windows of Corpus.train_batch."""
        windows, _ = super().train_batch(seed, step, global_batch_size, rows)
        return self.asked(windows, seed, [step * global_batch_size + row for row in rows])

    def val_batches(
        self, tokens: int | None, batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Iterator[tuple[Any, ...]]:
        """As Corpus.val_batches, and what else the model reads behind the floors, which are 0."""
        batches = super().val_batches(tokens, batch_size, dp_rank, dp_size)
        for index, (windows, plain, _) in zip(count(), batches, strict=False):
            first = (index * dp_size + dp_rank) * batch_size
            numbers = range(first, first + batch_size)
            inputs, *more, labels = self.asked(windows, EVALUATION, numbers)
            labels[(plain == IGNORED).all(axis=1)] = IGNORED  # no window
            yield inputs, labels, np.zeros(labels.shape), *more


class MaskedCorpus(ObjectiveCorpus):
    """Batches of the same windows, in which tokens are hidden; labels are what stood there.

    Of the tokens asked for, 80 % are replaced by mask_token, 10 % by a random token, and 10 % stay.
    """

    def __init__(self, corpus: Corpus, mask_token: int) -> None:
        super().__init__(corpus)
        self.mask_token = mask_token

    def asked(self, windows: Int64s, seed: int, numbers: Sequence[int]) -> tuple[Int64s, ...]:
        """(R, T) windows -> inputs and labels (R, T)."""
        inputs, labels = windows.copy(), np.full_like(windows, IGNORED)
        T = windows.shape[1]
        for row, number in enumerate(numbers):
            # The counter's last word sets these numbers apart from those that order the windows.
            philox = np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, 1])
            places = np.argsort(philox.random_raw(T), kind="stable")[: max(round(ASKED * T), 1)]
            how, random = philox.random_raw(2 * len(places)).reshape(2, -1)
            hidden, changed = how % 10 < 8, how % 10 == 8
            labels[row, places] = windows[row, places]
            inputs[row, places[hidden]] = self.mask_token
            inputs[row, places[changed]] = random[changed] % self.meta.vocab_size
        return inputs, labels


def hide_tokens(corpus: Corpus, model: GPTConfig, is_given: bool) -> tuple[GPTConfig, MaskedCorpus]:
    """The model with its vocabulary and its mask token, and the corpus with that objective.

    is_given: it is a checkpoint's model, which has its vocabulary already. Raises ConfigError for
    a mask token that is no id of it.
    """
    size, mask = corpus.meta.vocab_size, model.mask_token
    if mask is None and is_given:
        raise ConfigError(
            "which id hides a token? tokenizer.json of --init-from does not say; give --mask-token"
        )
    mask = size if mask is None else mask
    most = model.vocab_size - 1 if is_given else size
    if mask > most:
        raise ConfigError(
            f"mask_token={mask} is no id of the vocabulary; it can be 0 to {most}, or leave it out"
        )
    own = model.vocab_size if is_given else max(size, mask + 1)
    return replace(model, mask_token=mask, vocab_size=own), MaskedCorpus(corpus, mask)
