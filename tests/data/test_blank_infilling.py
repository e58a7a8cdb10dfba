"""Which spans are cut out for GLM, where they stand, that they come back, and in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rosetrainer.config import IGNORED, ConfigError, GPTConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.blank_infilling import BlankCorpus, SpanLengths, fill_blanks, sizes

C, V = 64, 8  # of the rows, and the markov corpus's ids
MASK, START, END = V, V + 1, V + 2
GLM = GPTConfig(architecture="glm")


@pytest.fixture
def corpus(markov: Path) -> BlankCorpus:
    model, corpus = fill_blanks(open_corpus(markov, C), GLM, is_given=False)
    assert (model.vocab_size, model.mask_token) == (V + 3, MASK)
    assert (model.start_token, model.end_token) == (START, END)
    return corpus


def test_a_row_holds_a_text_with_masks_and_its_spans_behind_it(
    corpus: BlankCorpus, markov: Path
) -> None:
    window, cut, spans = sizes(C)
    assert (window, cut, spans) == (58, 9, 3)
    windows, _ = open_corpus(markov, window).train_batch(7, 3, 40, range(40))
    batch = corpus.train_batch(7, 3, 40, range(40))
    orders, lengths = set(), []
    for text, ids, positions, span_positions, labels in zip(windows, *batch, strict=True):
        A = int((span_positions == 0).sum())
        assert A == window - cut + spans and (span_positions[:A] == 0).all()
        assert positions[:A].tolist() == list(range(A)) and (labels[:A] == IGNORED).all()
        starts = [int(place) for place in np.flatnonzero(ids == START)]
        assert len(starts) == spans == int((ids[:A] == MASK).sum())
        parts = {}
        for start, end in zip(starts, [*starts[1:], A + cut + spans], strict=True):
            (place,) = set(positions[start:end].tolist())
            assert ids[place] == MASK
            assert span_positions[start:end].tolist() == list(range(1, end - start + 1))
            assert labels[start : end - 1].tolist() == ids[start + 1 : end].tolist()
            assert labels[end - 1] == END
            parts[place] = labels[start : end - 1].tolist()
        whole = [t for i in range(A) for t in (parts[i] if ids[i] == MASK else [ids[i]])]
        assert whole == text.tolist()
        orders.add(tuple(np.argsort(list(parts))))
        lengths += [len(part) for part in parts.values()]
        assert (labels[A + cut + spans :] == IGNORED).all()
    assert len(orders) == 6  # of three spans, each order comes
    assert np.mean(lengths) == 3 and set(lengths) >= {1, 2, 3, 4, 5}


def test_lengths_are_those_of_a_poisson_distribution_with_their_sum() -> None:
    """Of two spans with five tokens: 1/n! of each, so 1/24, 1/12, 1/12 and 1/24 by the first."""
    lengths = SpanLengths(5, 2)
    found = [lengths.draw(np.random.Philox(seed)) for seed in range(6000)]
    assert all(sum(pair) == 5 for pair in found)
    counts = np.bincount([first for first, _ in found])
    expected = np.array([0, 1000, 2000, 2000, 1000])
    assert (abs(counts - expected) < 5 * np.sqrt(expected + 1)).all()
    for context in (4, 64, 512, 2**14):
        _, cut, spans = sizes(context)
        many = SpanLengths(cut, spans).draw(np.random.Philox(1))
        assert (len(many), sum(many), min(many)) == (spans, cut, 1)


def test_a_row_is_cut_alike_in_every_layout(corpus: BlankCorpus) -> None:
    whole = corpus.train_batch(7, 3, 8, range(8))
    for rows in (range(2), range(2, 4), range(5, 8)):
        for part, all_rows in zip(corpus.train_batch(7, 3, 8, rows), whole, strict=True):
            assert (part == all_rows[rows]).all()
    cuts = {tuple(row) for row in whole[1]}
    for seed, step in ((7, 4), (8, 3)):
        cuts |= {tuple(row) for row in corpus.train_batch(seed, step, 8, range(8))[1]}
    assert len(cuts) == 24


def test_evaluation_cuts_the_same_in_every_layout(corpus: BlankCorpus) -> None:
    rows = [row for batch in corpus.val_batches(58 * 7, 3) for row in zip(*batch, strict=True)]
    by_rank = [list(corpus.val_batches(58 * 7, 2, rank, 2)) for rank in range(2)]
    divided = [
        row
        for batches in zip(*by_rank, strict=True)
        for batch in batches
        for row in zip(*batch, strict=True)
    ]
    for number in range(7):
        assert all((a == b).all() for a, b in zip(rows[number], divided[number], strict=True))
    assert [int((labels != IGNORED).sum()) for _, labels, *_ in rows] == [12] * 7 + [0] * 2


def test_lengths_and_special_tokens_are_taken_or_refused(markov: Path) -> None:
    for context in range(4, 300):
        window, cut, spans = sizes(context)
        assert context - 3 <= window + 2 * spans <= context and cut + spans <= window
    plain = open_corpus(markov, C)
    model, corpus = fill_blanks(plain, replace(GLM, mask_token=0), is_given=False)
    assert model.mask_token == 0 and 0 in corpus.train_batch(1, 0, 1, range(1))[0]
    with pytest.raises(ConfigError, match="end_token=11 is no id of the vocabulary; it can be 0 t"):
        fill_blanks(plain, replace(GLM, end_token=11), is_given=False)
    with pytest.raises(ConfigError, match="context_length=3 has no place for a text"):
        fill_blanks(open_corpus(markov, 3), GLM, is_given=False)
