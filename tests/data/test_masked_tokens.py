"""Which tokens are hidden, by what, and that no layout changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rosetrainer.config import IGNORED, ConfigError, GPTConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.data.masked_tokens import MaskedCorpus, hide_tokens

T, V, MASK = 64, 8, 8  # the markov corpus's ids, and one more
BERT = GPTConfig(architecture="bert")


@pytest.fixture
def corpus(markov: Path) -> MaskedCorpus:
    model, corpus = hide_tokens(open_corpus(markov, T), BERT, is_given=False)
    assert (model.vocab_size, model.mask_token) == (V + 1, MASK)
    return corpus


def test_eight_in_ten_are_hidden_one_is_another_and_one_stays(
    corpus: MaskedCorpus, markov: Path
) -> None:
    plain, _ = open_corpus(markov, T).train_batch(7, 3, 1000, range(1000))
    inputs, labels = corpus.train_batch(7, 3, 1000, range(1000))
    asked = labels != IGNORED
    assert (asked.sum(axis=1) == round(0.15 * T)).all()
    assert (inputs == plain)[~asked].all() and (labels == plain)[asked].all()
    hidden, kept = (inputs == MASK)[asked], (inputs == plain)[asked]
    counts = np.array([hidden.sum(), (~hidden & ~kept).sum(), kept.sum()])
    # A random token is by chance the true one, about one time in V; the bounds are five sigma.
    expected = np.array([0.8, 0.1 * (1 - 1 / V), 0.1 * (1 + 1 / V)]) * asked.sum()
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert set(inputs[asked & (inputs != MASK)]) == set(range(V))
    places = asked.sum(axis=0)
    assert abs(places - 1000 * round(0.15 * T) / T).max() < 5 * np.sqrt(156)


def test_a_row_is_hidden_alike_in_every_layout(corpus: MaskedCorpus) -> None:
    """It depends on the seed, the step and the row, and on nothing else."""
    inputs, labels = corpus.train_batch(7, 3, 8, range(8))
    for rows in (range(2), range(2, 4), range(5, 8)):
        again = corpus.train_batch(7, 3, 8, rows)
        assert (again[0] == inputs[rows]).all() and (again[1] == labels[rows]).all()
    places = {tuple(row) for row in labels != IGNORED}
    for seed, step in ((7, 4), (8, 3)):
        places |= {tuple(row) for row in corpus.train_batch(seed, step, 8, range(8))[1] != IGNORED}
    assert len(places) == 24


def test_evaluation_hides_the_same_in_every_layout_and_counts_no_row_twice(
    corpus: MaskedCorpus, markov: Path
) -> None:
    rows = [row for batch in corpus.val_batches(T * 7, 3) for row in zip(*batch, strict=True)]
    by_rank = [list(corpus.val_batches(T * 7, 2, rank, 2)) for rank in range(2)]
    divided = [
        row
        for batches in zip(*by_rank, strict=True)
        for batch in batches
        for row in zip(*batch, strict=True)
    ]
    assert len(rows) == 9 and len(divided) == 8
    for number in range(7):
        for one, other in zip(rows[number], divided[number], strict=True):
            assert (one == other).all()
    assert [(labels != IGNORED).sum() for _, labels, _ in rows] == [10] * 7 + [0] * 2
    assert not corpus.has_floor and open_corpus(markov, T).has_floor
    assert not any(floors.any() for *_, floors in rows)


def test_a_mask_token_that_is_given_is_taken_or_refused(markov: Path) -> None:
    corpus = open_corpus(markov, T)
    model, masked = hide_tokens(corpus, replace(BERT, mask_token=5), is_given=False)
    assert (model.vocab_size, masked.mask_token) == (V, 5)
    theirs = replace(BERT, vocab_size=V, mask_token=3)
    assert hide_tokens(corpus, theirs, is_given=True)[0] == theirs
    with pytest.raises(ConfigError, match="mask_token=9 is no id of the vocabulary; it can be 0"):
        hide_tokens(corpus, replace(BERT, mask_token=9), is_given=False)
    with pytest.raises(ConfigError, match="mask_token=8 is no id .* it can be 0 to 7"):
        hide_tokens(corpus, replace(theirs, mask_token=8), is_given=True)
    with pytest.raises(ConfigError, match="which id hides a token.* give --mask-token"):
        hide_tokens(corpus, replace(theirs, mask_token=None), is_given=True)
