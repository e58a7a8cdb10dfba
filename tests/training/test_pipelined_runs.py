"""Runs of a pipeline: trained, evaluated, saved, resumed in other layouts, and written with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_all_equal
from ranks import run_ranks
from runs import STEPS, config_for, state, train_here

from rosetrainer.checkpoint.run_folder import read_run
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.models.generation import SamplingConfig, generate
from rosetrainer.parallel.context import init_parallel
from rosetrainer.training.setup import check_config
from rosetrainer.training.trained import load_model
from rosetrainer.validation import ConfigError


@pytest.fixture
def config(markov: Path, tmp_path: Path) -> TrainConfig:
    """Six tiny steps with dropout, a checkpoint after each."""
    return TrainConfig(
        GPTConfig(context_length=8, n_layers=4, n_heads=4, d_model=16, dropout=0.1),
        optim=OptimConfig(warmup_steps=2, global_batch_size=6, micro_batch_size=1),
    ).with_settings(
        data=markov,
        out=tmp_path / "run",
        steps=STEPS,
        eval_every=0,
        eval_tokens=64,
        dtype="float64",
        checkpoint_every=1,
        threads=1,
    )


def trained(config: TrainConfig, world: int, stop_after: int, **run: Any) -> dict[int, float]:
    """The losses by step that each rank knows; the run is asked to stop after a step."""
    found = run_ranks(world, train_here, config.with_settings(**run), world, stop_after)
    assert all(one == found[0] for one in found)
    return found[0]


MOVES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"pp_size": 2}),
    (4, {"pp_size": 4, "pp_schedule": "zero-bubble"}),
    (4, {"pp_size": 2, "tp_size": 2, "pp_schedule": "interleaved", "sequence_parallel": True}),
    (4, {"pp_size": 2, "dp_size": 2, "pp_schedule": "zero-bubble-v", "recompute": "block",
         "zero": 1, "check_replicas": 1, "eval_every": 5}),
    (2, {"tp_size": 2}),
]  # fmt: skip


def test_a_run_goes_through_pipelines_and_computes_what_one_process_does(
    config: TrainConfig, tmp_path: Path
) -> None:
    alone = trained(config, 1, 0)
    out = tmp_path / "moved"
    found: dict[int, float] = {}
    for stop, (world, layout) in enumerate(MOVES, 1):
        found |= trained(config, world, stop if stop < len(MOVES) else 0, out=out, **layout)
    assert list(found) == list(alone)
    assert found == pytest.approx(alone, rel=1e-10)
    moved, expected = (state(run / "step_000006") for run in (out, tmp_path / "run"))
    assert set(moved) == set(expected)
    for suffix in ("", "/exp_avg", "/exp_avg_sq"):
        names = [n for n in expected if n.endswith((f"bias{suffix}", f"weight{suffix}"))]
        plain = [n for n in names if "query_key_value.bias/" not in n]
        assert len(plain) > 20
        assert_all_equal(
            {n.removesuffix(suffix): moved[n] for n in plain},
            {n.removesuffix(suffix): expected[n] for n in plain},
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble-v"])
def test_a_resumed_pipeline_is_bitwise_the_one_that_was_not_interrupted(
    config: TrainConfig, tmp_path: Path, dtype: str, schedule: str
) -> None:
    layout: dict[str, Any] = {"pp_size": 2, "pp_schedule": schedule, "dtype": dtype}
    whole = trained(config, 2, 0, **layout)
    out = tmp_path / "resumed"
    first = trained(config, 2, 3, out=out, **layout)
    rest = trained(config, 2, 0, out=out, **layout)
    assert (list(first), list(rest)) == ([1, 2, 3], [4, 5, 6])
    assert first | rest == whole
    ours, expected = (state(run / "step_000006") for run in (out, tmp_path / "run"))
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def figures(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [v for line in lines for tag, v in line.items() if tag.startswith(("train/", "val/"))]


def test_a_pipeline_s_run_logs_what_one_process_does(markov: Path, tmp_path: Path) -> None:
    """Losses, norms and evaluations, the floor of the corpus too; replicas are compared."""
    curves = {}
    for pp_size in (1, 2):
        config = config_for(markov, tmp_path / f"pp{pp_size}", dtype="float64", check_replicas=1)
        run_ranks(pp_size, train_here, config.with_settings(pp_size=pp_size), pp_size, 0)
        curves[pp_size] = figures(tmp_path / f"pp{pp_size}")
    assert len(curves[1]) == 6 * 3 + 2 * 2
    assert curves[2] == pytest.approx(curves[1], abs=1.1e-6)  # the log has six decimals


def write(run: Path, parallel: ParallelConfig) -> list[int]:
    context = init_parallel(parallel)
    model = load_model(run, read_run(run)[0].model, context)
    sampling = SamplingConfig(tokens=12, seed=3)
    return list(generate(model, torch.tensor([3, 1, 4]), sampling, context))


def test_every_layout_writes_the_same_text(config: TrainConfig, tmp_path: Path) -> None:
    trained(config, 2, 0, steps=2, pp_size=2)
    texts = set()
    for world, parallel in ((1, ParallelConfig()), (2, ParallelConfig(pp_size=2)),
                            (4, ParallelConfig(tp_size=2, pp_size=2))):  # fmt: skip
        texts |= set(map(tuple, run_ranks(world, write, tmp_path / "run", parallel)))
    assert len(texts) == 1
    assert len(texts.pop()) == 12


@pytest.mark.parametrize(
    ("settings", "world", "text"),
    [
        ({"pp_size": 8}, 8, "pp_size=8 x 1 stages of a rank are more than n_layers=4; their "
         "product can be 4 at most"),
        ({"pp_size": 4, "pp_schedule": "interleaved"}, 4, "pp_schedule=interleaved takes a "
         "multiple of pp_size=4 micro-batches, and global_batch_size / dp_size / "
         "micro_batch_size = 6; it can be 4 or 8"),
        ({"pp_size": 3}, 4, "world size 4 is not tp_size x dp_size x pp_size = 1 x 1 x 3; start 3 "
         "ranks, or choose sizes whose product is 4"),
        ({"pp_size": 2, "compile": "on"}, 2, "compile=on does not go with pp_size=2, a pipeline's "
         "stages; pp_size can be 1; or use --compile off"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    config: TrainConfig, settings: dict[str, Any], world: int, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config.with_settings(**settings), world)
    assert str(caught.value) == text


def test_a_pipeline_runs_where_it_has_been_tried() -> None:
    ParallelConfig(pp_size=2).check_device("cpu")
    ParallelConfig().check_device("cuda")
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(pp_size=2).check_device("cuda")
    assert str(caught.value) == (
        "pp_size=2 sends by gloo, on CPUs only, and device=cuda; pp_size can be 1, or use "
        "--device cpu"
    )
