"""What is cut out of a text, that it comes back, and that no layout changes it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rosetrainer.config import IGNORED, ConfigError, GPTConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.span_corruption import SpanCorpus, corrupt_spans

C, V = 64, 8  # of the windows, and the markov corpus's ids
START, END, LAST = V, V + 1, V + 101
T5 = GPTConfig(architecture="t5", bias=False)


@pytest.fixture
def corpus(markov: Path) -> SpanCorpus:
    model, corpus = corrupt_spans(open_corpus(markov, C), T5, is_given=False)
    assert (model.vocab_size, model.start_token, model.end_token) == (V + 102, START, END)
    assert model.sentinel_token == LAST
    return corpus


def put_back(source: list[int], target: list[int]) -> tuple[list[int], list[int]]:
    """The text of a source and a target, which end; and the length of each span."""
    assert source[-1] == target[-1] == END and target[0] == LAST
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token > END:
            assert token == LAST - len(spans)
            spans[token] = []
        else:
            spans[LAST - len(spans) + 1].append(token)
    assert [token for token in source if token > END] == list(spans)
    text = [piece for token in source[:-1] for piece in spans.get(token, [token])]
    assert all(a < V or b < V for a, b in pairwise(source)), "spans touch"
    return text, [len(span) for span in spans.values()]


def test_what_is_cut_out_comes_back(corpus: SpanCorpus, markov: Path) -> None:
    plain, _ = open_corpus(markov, C).train_batch(7, 3, 200, range(200))
    sources, masks, targets, labels = corpus.train_batch(7, 3, 200, range(200))
    assert sources.shape[1] % 8 == targets.shape[1] % 8 == 0
    assert (targets[:, 0] == START).all()
    lengths, firsts = [], 0
    for window, source, mask, target, label in zip(
        plain, sources, masks, targets, labels, strict=True
    ):
        wanted = label[label != IGNORED]
        assert (target[1 : len(wanted)] == wanted[:-1]).all()
        assert (mask == (np.arange(len(mask)) < mask.sum())).all()
        text, spans = put_back(source[mask == 1].tolist(), wanted.tolist())
        assert text == window.tolist() and min(spans) > 0 and sum(spans) == round(0.15 * C)
        lengths += spans
        firsts += int(source[0] == LAST)
    assert np.mean(lengths) == pytest.approx(10 / 3)
    assert set(lengths) > {1, 2, 3, 4, 5, 6}
    assert 0 < firsts < 40  # one window in fifteen or so begins with a span


def test_a_row_is_cut_alike_in_every_layout(corpus: SpanCorpus) -> None:
    whole = corpus.train_batch(7, 3, 8, range(8))
    for rows in (range(2), range(2, 4), range(5, 8)):
        for part, all_rows in zip(corpus.train_batch(7, 3, 8, rows), whole, strict=True):
            assert (part == all_rows[rows]).all()
    cuts = {tuple(row >= V) for row in whole[0]}
    for seed, step in ((7, 4), (8, 3)):
        cuts |= {tuple(row >= V) for row in corpus.train_batch(seed, step, 8, range(8))[0]}
    assert len(cuts) == 24


def test_evaluation_cuts_the_same_in_every_layout(corpus: SpanCorpus) -> None:
    rows = [row for batch in corpus.val_batches(C * 7, 3) for row in zip(*batch, strict=True)]
    by_rank = [list(corpus.val_batches(C * 7, 2, rank, 2)) for rank in range(2)]
    divided = [
        row
        for batches in zip(*by_rank, strict=True)
        for batch in batches
        for row in zip(*batch, strict=True)
    ]
    assert (len(rows), len(divided)) == (9, 8)
    for number in range(7):
        assert all((a == b).all() for a, b in zip(rows[number], divided[number], strict=True))
    assert [int((labels != IGNORED).sum()) for _, labels, *_ in rows] == [14] * 7 + [0] * 2
    assert not corpus.has_floor


def test_special_tokens_that_are_given_are_taken_or_refused(markov: Path) -> None:
    corpus = open_corpus(markov, C)
    theirs = replace(T5, vocab_size=V, start_token=0, end_token=1, sentinel_token=7)
    model, cut = corrupt_spans(corpus, theirs, is_given=True)
    assert model == theirs and cut.train_batch(1, 0, 1, range(1))[2][0, 0] == 0
    with pytest.raises(ConfigError, match="sentinel_token is not said by .* give --sentinel-token"):
        corrupt_spans(corpus, replace(theirs, sentinel_token=None), is_given=True)
    with pytest.raises(ConfigError, match="end_token=8 is no id of the vocabulary; it can be 0 to"):
        corrupt_spans(corpus, replace(theirs, end_token=8), is_given=True)
    with pytest.raises(ConfigError, match="context_length=18: a source would have 24 tokens"):
        corrupt_spans(open_corpus(markov, 18), T5, is_given=False)
