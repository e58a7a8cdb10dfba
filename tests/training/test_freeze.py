"""--freeze: what is not trained stays bit for bit, in any layout and over breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_all_equal
from ranks import run_ranks
from runs import STEPS, state, tiny, train_here

from rosetrainer.commands import plan
from rosetrainer.config import ConfigError, GPTConfig, OptimConfig, TrainConfig
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import draw_whole, shard_spec
from rosetrainer.training.setup import check_config, train

PATTERNS = "token_embedding*,blocks.0.*, *.dense_h_to_4h.weight"


def test_a_run_goes_through_layouts_as_in_one_process(markov: Path, tmp_path: Path) -> None:
    """tp 2 -> dp 4 at level 3 -> tp 2 x dp 2 at level 1, tied and with Muon."""
    model = GPTConfig(8, context_length=8, n_layers=2, n_heads=4, d_model=16, dropout=0.1)
    optim = OptimConfig(warmup_steps=2, global_batch_size=4, optimizer="muon", freeze=PATTERNS)
    config = TrainConfig(model, optim=optim).with_settings(
        data=markov,
        steps=STEPS,
        eval_every=1,
        eval_tokens=64,
        threads=1,
        dtype="float64",
        checkpoint_every=1,
    )

    def trained(out: str, world: int, dp: int, zero: int, until: int) -> None:
        run = config.with_settings(dp_size=dp, zero=zero, out=tmp_path / out)
        run_ranks(world, train_here, run, world, until)

    trained("alone", 1, 1, 0, 0)
    for until, (world, dp, zero) in {2: (2, 1, 0), 4: (4, 4, 3), 0: (4, 2, 1)}.items():
        trained("moved", world, dp, zero, until)
    moved, alone = (state(tmp_path / out / "step_000006") for out in ("moved", "alone"))
    assert_all_equal(moved, alone)
    specs = {
        name: shard_spec(p) for name, p in build_model(model, ParallelContext()).named_parameters()
    }
    frozen = [n for n in specs if n.startswith(("token", "blocks.0")) or "dense_h_to_4h.w" in n]
    assert len(frozen) == 14
    for name in specs:
        start = draw_whole(specs[name], config.run.seed, name).double()
        found = moved[name].view_as(start)
        assert torch.equal(found, start) == (name in frozen)
        assert any(key.startswith(f"{name}/") for key in moved) == (name not in frozen)


def test_a_head_that_is_trained_alone_is_evaluated_at_each_level(
    markov: Path, tmp_path: Path
) -> None:
    """An evaluation calls parts of the model, not the model itself."""
    config = tiny(markov, tmp_path, tied=False, steps=2, eval_every=1, dtype="float64", dp_size=2)
    config = config.with_settings(freeze="*embedding*,blocks.*,final_norm*")
    logs = set()
    for level in (0, 1, 3):
        out = tmp_path / str(level)
        run_ranks(2, train_here, config.with_settings(zero=level, out=out), 2, 0)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        logs.add(tuple(one[key] for one in lines for key in one if key.endswith("/loss")))
    assert len(logs) == 1
    assert len(logs.pop()) == 4


def refusal(config: TrainConfig, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        train(*check_config(config.with_settings(**changes), 1))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_frozen_is_one_line(
    markov: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0)
    config = tiny(markov, tmp_path / "run", steps=1, eval_every=0)
    parts = "token_embedding*, position_embedding*, blocks.0.*, final_norm*"
    for patterns, what in {"blocks.7.*": "blocks.7.*", "final*,,": "an empty pattern"}.items():
        assert refusal(config, freeze=patterns) == (
            f"freeze={patterns}: {what} is no parameter's name; it can be {parts}, or any name "
            f"that these match"
        )
    assert refusal(config, freeze="*") == (
        f"freeze=* leaves nothing to train; leave out one of {parts} at least"
    )
    assert "output_head* is no parameter's name" in refusal(config, freeze="output_head*")  # tied
    with pytest.raises(ConfigError, match=r"freeze=a\* does not go with a pipeline yet, and pp_s"):
        config.with_settings(freeze="a*", pp_size=2, n_layers=2).check(2)
    with pytest.raises(ConfigError, match="plan has no closed form for freeze=a, only for None;"):
        plan.main(["--vocabulary", "8", "--freeze", "a"])
    assert not (tmp_path / "run").exists()
    train(*check_config(config.with_settings(freeze="final_norm*"), 1))
    assert "parameters on this rank, 16 of them frozen, vocabulary" in capsys.readouterr().out
    assert "this run has freeze=None and not final_norm* like" in refusal(config, steps=2)
