"""Two seeds make two runs, also where they differ above the 32 bits that some generators take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from oracle import tiny_config

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.data.batches import open_corpus
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.dropout import Dropout, DropoutSeed
from rosetrainer.parallel.sharding import init_weights, shard_spec

SEEDS = (0, 1, 2**31, 2**32, 2**32 + 1, 2**33 + 1, 2**40 - 2**32, 2**40)


def test_each_seed_has_its_own_initial_weights() -> None:
    model, seen = GPTModel(tiny_config()), []
    drawn = [name for name, p in model.named_parameters() if shard_spec(p).init_std]
    for seed in SEEDS:
        init_weights(model, seed)
        seen.append({name: model.get_parameter(name).detach().clone() for name in drawn})
    for name in drawn:
        assert len({tuple(one[name].flatten().tolist()) for one in seen}) == len(SEEDS), name


def test_each_seed_has_its_own_masks() -> None:
    dropout, x = Dropout(0.5), torch.ones(4, 64)
    masks = {tuple(dropout(x, DropoutSeed(seed, 0), ()).flatten().tolist()) for seed in SEEDS}
    assert len(masks) == len(SEEDS)


def test_a_probability_next_to_one_drops_all_but_a_65536th() -> None:
    x = torch.ones(1024, 1024)
    for p in (1 - 2**-16, 1 - 2**-20):
        left = Dropout(p)(x, DropoutSeed(7, 0), ())
        assert set(left.unique().tolist()) == {0.0, 2.0**16}
        assert 4 <= int((left > 0).sum()) <= 32, "16 are expected of 2**20"


def test_each_seed_has_its_own_order_of_the_data(markov: Path) -> None:
    corpus = open_corpus(markov, 8)
    batches = {np.asarray(corpus.train_batch(s, 0, 8, range(8))).tobytes() for s in SEEDS}
    assert len(batches) == len(SEEDS)


def test_each_seed_draws_its_own_corpus(tmp_path: Path) -> None:
    texts = set()
    for seed in SEEDS:
        out = tmp_path / str(seed)
        size = ["--train-tokens", "2000", "--val-tokens", "500"]
        prepare(["markov", "--out", str(out), "--seed", str(seed), *size])
        texts.add((out / "train.bin").read_bytes())
    assert len(texts) == len(SEEDS)
