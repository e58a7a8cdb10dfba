"""The same proofs on a GPU, where there is one: `pytest tests/test_cuda.py` is the one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prepare import main as prepare
from test_checkpoint import state, train_here

from rosetrainer.config import GPTConfig, OptimConfig, RunConfig, TrainConfig
from rosetrainer.dropout import Dropout, DropoutSeed
from rosetrainer.parallel_context import init_parallel
from rosetrainer.parity import prove
from rosetrainer.performance import choose_dtype
from rosetrainer.train import check_config, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
MODEL = GPTConfig(context_length=16, n_layers=2, n_heads=4, d_model=64)


def test_one_gpu_computes_what_the_oracle_does() -> None:
    context = init_parallel(TrainConfig().parallel, "cuda")
    for dropout, recompute in ((0.0, "none"), (0.1, "attention"), (0.1, "block")):
        again = replace(context, recompute=recompute)
        config = replace(MODEL, dropout=dropout)
        assert all(difference.is_rounding for difference in prove(config, again))


def test_dropout_s_masks_are_those_of_the_cpu() -> None:
    layer, seed = Dropout(0.1), DropoutSeed(seed=1, step=2, first_row=3)
    x = torch.ones(5, 7, 33)
    assert torch.equal(layer(x.cuda(), seed, (4,)).cpu(), layer(x, seed, (4,)))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_one_gpu_trains(tmp_path: Path, dtype: str) -> None:
    prepare(["markov", "--out", str(tmp_path / "markov")])
    run = RunConfig(data=tmp_path / "markov", out=tmp_path / "run", steps=30, dtype=dtype)  # type: ignore[arg-type]
    config = TrainConfig(MODEL, optim=OptimConfig(learning_rate=1e-2), run=run)
    model, _ = train(*check_config(config, 1))
    assert model.token_embedding.weight.device.type == "cuda"
    assert choose_dtype("float32", torch.device("cuda")) == torch.float32
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(log) == 31


def test_a_deterministic_run_goes_on_bitwise(tmp_path: Path) -> None:
    prepare(["markov", "--out", str(tmp_path / "markov")])
    shared = {"data": tmp_path / "markov", "steps": 6, "eval_every": 0, "deterministic": True}
    losses: dict[str, dict[int, float]] = {}
    for name, stops in (("whole", [0]), ("resumed", [3, 0])):
        run = RunConfig(out=tmp_path / name, checkpoint_every=1, **shared)  # type: ignore[arg-type]
        config = TrainConfig(replace(MODEL, dropout=0.1), run=run)
        losses[name] = {}
        for stop in stops:
            losses[name] |= train_here(config, 1, stop)
    assert losses["resumed"] == losses["whole"]
    ours, expected = (state(tmp_path / name / "step_000006") for name in losses)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
