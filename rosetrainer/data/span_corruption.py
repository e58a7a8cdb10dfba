"""The objective of T5: spans are cut out of a text, and the model writes what stood there.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (Raffel et al.).
Shape letters: R rows of a batch, C context_length, S source, T target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rosetrainer.config import IGNORED, GPTConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.data.masked_tokens import ObjectiveCorpus
from rosetrainer.data.token_file import Int64s
from rosetrainer.validation import ConfigError

CUT = 0.15  # of a row's tokens, at least one
SPAN = 3  # tokens of a span in the mean
SENTINELS = 100  # ids that stand for a span, where the vocabulary is made here
ROUNDED_TO = 8  # lengths, which sequence parallelism divides


@dataclass(frozen=True)
class SpecialTokens:
    start: int
    end: int
    sentinel: int
    """Of the first span; the ids before it, downwards, are those of the next ones."""


class SpanCorpus(ObjectiveCorpus):
    """Batches of the same windows, each a source without its spans, and these as target.

    Of "a b c d e f g" without "b c" and "f" the source is "a X d e Y g end", and the target "X b c
    Y f end", X and Y the first two sentinels. All rows have as many spans, so they are as long.
    """

    def __init__(self, corpus: Corpus, special: SpecialTokens) -> None:
        super().__init__(corpus)
        self.special = special
        self.cut, self.spans = cut_out(corpus.context_length)
        self.source_length = corpus.context_length - self.cut + self.spans + 1

    def asked(self, windows: Int64s, seed: int, numbers: Sequence[int]) -> tuple[Int64s, ...]:
        """(R, C) windows -> sources (R, S), their masks, targets (R, T) and labels (R, T)."""
        rows, (S, T) = len(windows), lengths(windows.shape[1])
        sources, masks = np.full((rows, S), self.special.end), np.zeros((rows, S), np.int64)
        masks[:, : self.source_length] = 1
        targets, labels = np.full((rows, T), self.special.end), np.full((rows, T), IGNORED)
        for row, number in enumerate(numbers):
            source, target = self.parts_of(windows[row], seed, number)
            sources[row, : len(source)] = source
            labels[row, : len(target)] = target
            targets[row, : len(target)] = [self.special.start, *target[:-1]]
        return sources, masks, targets, labels

    def parts_of(self, window: Int64s, seed: int, number: int) -> tuple[list[int], list[int]]:
        """The window without its spans, and these."""
        philox = np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, 2])
        source, target, place = [], [], 0
        lengths = divided(self.cut, self.spans, philox)
        spans = places_of_spans(len(window), lengths, philox)
        for number_of_span, (start, end) in enumerate(spans):
            sentinel = self.special.sentinel - number_of_span
            source += [*window[place:start].tolist(), sentinel]
            target += [sentinel, *window[start:end].tolist()]
            place = end
        end_token = self.special.end
        return [*source, *window[place:].tolist(), end_token], [*target, end_token]


def cut_out(context_length: int) -> tuple[int, int]:
    """How many tokens of a window, and in how many spans."""
    cut = max(round(CUT * context_length), 1)
    return cut, max(round(cut / SPAN), 1)


def lengths(context_length: int) -> tuple[int, int]:
    """(S, T), those of a batch; a source and a target have a token for each span and an end."""
    cut, spans = cut_out(context_length)
    source, target = context_length - cut + spans + 1, cut + spans + 1
    return -(-source // ROUNDED_TO) * ROUNDED_TO, -(-target // ROUNDED_TO) * ROUNDED_TO


def places_of_spans(
    length: int, lengths: list[int], philox: np.random.Philox
) -> list[tuple[int, int]]:
    """Start and end of each of the spans of a text, which have these lengths.

    Only before the first one may be no text, so that no two spans touch.
    """
    texts = divided(length - sum(lengths) + 1, len(lengths) + 1, philox)
    texts[0] -= 1
    found, place = [], 0
    for text, of_span in zip(texts, lengths, strict=False):  # after the last span comes text
        found.append((place + text, place + text + of_span))
        place += text + of_span
    return found


def divided(total: int, parts: int, philox: np.random.Philox) -> list[int]:
    """Positive numbers with this sum, each such list as likely as any other."""
    order = np.argsort(philox.random_raw(max(total - 1, 1)), kind="stable")
    borders = sorted(int(place) + 1 for place in order[: parts - 1])
    return [end - start for start, end in zip([0, *borders], [*borders, total], strict=True)]


def corrupt_spans(corpus: Corpus, model: GPTConfig, is_given: bool) -> tuple[GPTConfig, SpanCorpus]:
    """The model with its vocabulary and its special tokens, and the corpus with that objective.

    is_given: it is a checkpoint's model, which has its vocabulary already. Raises ConfigError for
    an id that it lacks, or a context too short to have something cut out.
    """
    size = corpus.meta.vocab_size
    own = model.vocab_size if is_given else size + 2 + SENTINELS
    behind = {"start_token": size, "end_token": size + 1, "sentinel_token": own - 1}
    if is_given and (missing := [name for name in behind if getattr(model, name) is None]):
        flag = "--" + missing[0].replace("_", "-")
        raise ConfigError(f"{missing[0]} is not said by the folder of --init-from; give {flag}")
    given = ids_behind(model, behind, own)
    changed = SpanCorpus(corpus, SpecialTokens(*given.values()))
    longest, _ = lengths(corpus.context_length)
    if longest > corpus.context_length or changed.spans > min(SENTINELS, given["sentinel_token"]):
        raise ConfigError(
            f"context_length={corpus.context_length}: a source would have {longest} tokens, with "
            f"{changed.spans} spans cut out; it can be a multiple of {ROUNDED_TO} from 16 to 2000"
        )
    return replace(model, vocab_size=own, **given), changed


def ids_behind(model: GPTConfig, behind: dict[str, int], own: int) -> dict[str, Any]:
    """Special tokens by their names in the config: what that says, else the id that `behind` has.

    own: the size of the vocabulary. Raises ConfigError for one that is no id of it.
    """
    values = {name: getattr(model, name) for name in behind}
    given = {n: behind[n] if value is None else int(value) for n, value in values.items()}
    for name, token in given.items():
        if token >= own:
            raise ConfigError(
                f"{name}={token} is no id of the vocabulary; it can be 0 to {own - 1}"
            )
    return given
