"""A corpus drawn from a random Markov chain, whose true loss is known: the floor for any model."""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from rosetrainer.data.token_file import Int64s
from rosetrainer.data.tokenizer import Ids, IdsTokenizer

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class MarkovChain:
    """A chain of order k over A tokens: the last k tokens decide the next one's distribution.

    probabilities is (A^k, A); row number: the last k tokens, oldest first, as digits to base A.
    The first k tokens of a file are uniform and independent.
    """

    order: int
    probabilities: Floats

    def label_losses(self, tokens: Int64s) -> Floats:
        """The true loss in nats of the labels tokens[1:]: no model can do better.

        tokens: all N of a file, (N,) -> (N - 1,). The first k tokens have no k before them;
        uniform as they are, they cost ln A each.
        """
        alphabet = self.probabilities.shape[1]
        count = max(len(tokens) - self.order, 0)
        context = np.zeros(count, np.int64)
        for age in range(self.order):
            context = context * alphabet + tokens[age : age + count]
        known = -np.log(self.probabilities[context, tokens[self.order :]])
        first = np.full(min(self.order, len(tokens)) - 1, math.log(alphabet))
        return np.concatenate([first, known])


def write_corpus(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Writes train.bin and val.bin; gives meta.json's keys, with the chain and its true loss."""
    from rosetrainer.data.corpus_writer import write_tokens  # training reads, and needs it not

    lengths = (options["train_tokens"], options["val_tokens"])
    chain, (train, val) = draw(options["order"], options["alphabet"], options["seed"], lengths)
    meta = write_tokens(folder, IdsTokenizer(options["alphabet"]), [("train", train), ("val", val)])
    return {
        **meta,
        "tokenizer": "markov",
        "chain": {"order": chain.order, "probabilities": chain.probabilities.tolist()},
        "floor_nats": float(chain.label_losses(val.astype(np.int64)).mean()),
    }


def draw(
    order: int, alphabet: int, seed: int, lengths: tuple[int, ...]
) -> tuple[MarkovChain, list[Ids]]:
    """A random chain, and for each length tokens drawn from it.

    Dirichlet(1/2) rows: 8 letters are left with 1.47 of their ln 8 = 2.08 nats on average.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    table = generator.dirichlet(np.full(alphabet, 0.5), size=alphabet**order)
    table = np.maximum(table, 1e-6)  # no token is impossible, so no loss is infinite
    chain = MarkovChain(order, table / table.sum(axis=1, keepdims=True))
    cumulative = [list(accumulate(row))[:-1] for row in chain.probabilities.tolist()]

    def sample(length: int) -> Ids:
        tokens = generator.integers(alphabet, size=min(order, length)).tolist()
        context = 0
        for token in tokens:
            context = context * alphabet + token
        for uniform in generator.random(length - len(tokens)).tolist():
            token = bisect(cumulative[context], uniform)
            tokens.append(token)
            context = (context * alphabet + token) % len(cumulative)
        return np.array(tokens, np.uint16)

    return chain, [sample(length) for length in lengths]


def leak_report(mean: float, standard_error: float) -> str | None:
    """One line if the model's loss lies under the floor by more than three standard errors.

    mean and standard_error are those of the difference, model minus true chain, per token.
    """
    if not mean < -3 * standard_error:
        return None
    return (
        f"the validation loss lies {-mean:.4f} nats under the floor (standard error "
        f"{standard_error:.4f}), and no honest model can: labels leak into the inputs; look at the "
        "causal mask and at the shift of the labels"
    )


def mean_and_error(count: int, total: float, total_of_squares: float) -> tuple[float, float]:
    """Mean and standard error of `count` differences out of sums, which ranks can add up."""
    mean = total / count
    variance = max(total_of_squares / count - mean**2, 0.0)
    return mean, math.sqrt(variance / count)
