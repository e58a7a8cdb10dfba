"""The objective of GLM: spans are cut out of a text, and the model writes each after the text.

"GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (Du et al.).
Shape letters: R rows of a batch, C context_length, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rosetrainer.config import IGNORED, GPTConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.data.masked_tokens import ObjectiveCorpus
from rosetrainer.data.span_corruption import CUT, SPAN, ids_behind, places_of_spans
from rosetrainer.data.token_file import Int64s
from rosetrainer.validation import ConfigError

LONGEST = 32  # tokens of a span: of a Poisson distribution of mean 3 hardly anything lies above


@dataclass(frozen=True)
class BlankTokens:
    mask: int
    """In the text, in the place of a span."""
    start: int
    """Before a span that is written."""
    end: int
    """What follows its last token."""


class BlankCorpus(ObjectiveCorpus):
    """Batches of windows, each part A, a text with masks, and part B, the spans behind it.

    Of "a b c d e f g" without "b c" and "f" A is "a M d e M g", and B, in any order, "S f" and
    "S b c", whose labels are "f E" and "b c E". All rows have as many spans, so they are as long.
    """

    def __init__(self, corpus: Corpus, special: BlankTokens) -> None:
        self.row_length, self.special = corpus.context_length, special
        window, cut, spans = sizes(corpus.context_length)
        self.lengths = SpanLengths(cut, spans)
        super().__init__(corpus, window)

    def asked(self, windows: Int64s, seed: int, numbers: Sequence[int]) -> tuple[Int64s, ...]:
        """(R, W) windows -> ids, positions, span positions and labels, each (R, C).

        What is left of C is of no part: it is not asked for, and nothing looks at it.
        """
        shape = (len(windows), self.row_length)
        ids, labels = np.full(shape, self.special.end), np.full(shape, IGNORED)
        positions, span_positions = np.zeros(shape, np.int64), np.ones(shape, np.int64)
        for row, number in enumerate(numbers):
            text, spans = self.parts_of(windows[row], seed, number)
            A = end = len(text)
            ids[row, :A], positions[row, :A], span_positions[row, :A] = text, np.arange(A), 0
            for place, span in spans:
                here = slice(end, end + len(span) + 1)
                ids[row, here], labels[row, here] = (
                    [self.special.start, *span],
                    [*span, self.special.end],
                )
                positions[row, here], span_positions[row, here] = (
                    place,
                    np.arange(len(span) + 1) + 1,
                )
                end = here.stop
        return ids, positions, span_positions, labels

    def parts_of(
        self, window: Int64s, seed: int, number: int
    ) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """Part A, and the spans in random order, each with the place of its mask in A."""
        philox = np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, 3])
        text, spans, place = [], [], 0
        lengths = self.lengths.draw(philox)
        for start, end in places_of_spans(len(window), lengths, philox):
            text += [*window[place:start].tolist(), self.special.mask]
            spans.append((len(text) - 1, window[start:end].tolist()))
            place = end
        order = np.argsort(philox.random_raw(len(spans)), kind="stable")
        return [*text, *window[place:].tolist()], [spans[i] for i in order]


class SpanLengths:
    """Lengths of `spans` spans with `cut` tokens together.

    The paper draws from a Poisson distribution of mean 3 until 15 % are cut out; here too, but of
    the draws without an empty span only those that have this number and this sum.
    """

    def __init__(self, cut: int, spans: int) -> None:
        n = np.arange(1, min(cut, LONGEST) + 1)
        self.weights = SPAN**n / np.cumprod(n, dtype=np.float64) / np.expm1(SPAN)  # each one's
        self.reach = np.zeros((spans + 1, cut + 1))  # that so many spans have so many tokens
        self.reach[0, 0] = 1
        for number in range(spans):
            for length, weight in zip(n, self.weights, strict=True):
                self.reach[number + 1, length:] += weight * self.reach[number, :-length]

    def draw(self, philox: np.random.Philox) -> list[int]:
        spans, left = (size - 1 for size in self.reach.shape)
        lengths = []
        for number in range(spans - 1, -1, -1):
            after = self.reach[number, max(left - len(self.weights), 0) : left][::-1]
            up_to = np.cumsum(self.weights[: len(after)] * after)
            chance = int(philox.random_raw()) / 2**64 * up_to[-1]
            lengths.append(int(np.searchsorted(up_to, chance, side="right")) + 1)
            left -= lengths[-1]
        return lengths


def sizes(context_length: int) -> tuple[int, int, int]:
    """(W, how many of these are cut out, in how many spans) of the longest window that fits into
    context_length with a mask and a start more for each span. Raises ConfigError if none does."""
    for window in range(context_length, 1, -1):
        cut = max(round(CUT * window), 1)
        spans = max(round(cut / SPAN), 1)
        if window + 2 * spans <= context_length:
            return window, cut, spans
    raise ConfigError(
        f"context_length={context_length} has no place for a text, a span of it and their masks; "
        f"it can be 4 or more"
    )


def fill_blanks(corpus: Corpus, model: GPTConfig, is_given: bool) -> tuple[GPTConfig, BlankCorpus]:
    """The model with its vocabulary and its special tokens, and the corpus with that objective.

    is_given: no checkpoint of others is such a model. Raises ConfigError for an id that the
    vocabulary lacks, or a context too short to have something cut out.
    """
    assert not is_given, "no folder of --init-from is a GLM of this kind"
    size = corpus.meta.vocab_size
    behind = {"mask_token": size, "start_token": size + 1, "end_token": size + 2}
    given = ids_behind(model, behind, size + 3)
    tokens = BlankTokens(*given.values())
    return replace(model, vocab_size=size + 3, **given), BlankCorpus(corpus, tokens)
