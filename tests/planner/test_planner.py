"""The closed forms beside figures that were counted; test_lattice.py has those of each layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lattice
import pytest
import torch
from oracle import random_batch
from ranks import run_ranks

from rosetrainer.commands.plan import main as plan_command
from rosetrainer.config import GPTConfig, ParallelConfig, TrainConfig
from rosetrainer.hardware.kernels import fast_kernels
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.data_parallel import buckets
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.planner.layout import Work, plan
from rosetrainer.planner.layout import buckets as bucket_bytes
from rosetrainer.planner.report import plan_training
from rosetrainer.validation import ConfigError

BF16 = GPTConfig(139, context_length=64, n_layers=3, n_heads=4, d_model=64)


def kept_in_bf16(parallel: ParallelConfig, dropout: float) -> tuple[int, dict[object, object]]:
    context = init_parallel(parallel)
    model = GPTModel(replace(BF16, dropout=dropout), context)
    init_weights(model, seed=1)
    batch = random_batch(replace(BF16, context_length=66), rows=4)
    autocast = autocast_for(torch.bfloat16, context.device)
    with fast_kernels(torch.bfloat16, context.device), autocast():
        kept = lattice.kept(model, batch, DropoutSeed(1, 2))
    context.tp.ledger.clear()
    with autocast():
        _, loss = model(batch[0], labels=batch[1], return_logits=False, seed=DropoutSeed(1, 2))
    loss.backward()
    entries = context.tp.ledger.entries.items()
    return kept, {("tp", *key): (t.calls, t.payload_bytes) for key, t in entries}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recompute, dropout", [("none", 0.0), ("none", 0.1), ("block", 0.1)])
def test_bf16_activations_are_predicted_within_five_percent(
    sequence_parallel: bool, recompute: str, dropout: float
) -> None:
    parallel = ParallelConfig(2, 1, sequence_parallel, recompute)  # type: ignore[arg-type]
    predicted = plan(replace(BF16, dropout=dropout), parallel, Work(4, 64, product_bytes=2))
    for kept, moved in run_ranks(2, kept_in_bf16, parallel, dropout):
        assert kept == pytest.approx(predicted.memory["activations"], rel=0.05)
        # Without what a whole step adds: the sums of gradients, the norm, the check for nan.
        for key, counted in moved.items():
            in_step = predicted.ledger[key]
            more = key == ("tp", "all_reduce", "backward") and sequence_parallel
            assert counted == in_step or more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute, dropout", [("none", 0.1), ("attention", 0.0), ("block", 0.1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_transformer_xl_keeps_is_what_was_counted(
    dtype: torch.dtype, recompute: Any, dropout: float, rows: int
) -> None:
    """Of one row products copy nothing; no weight is kept whose input has no gradient."""
    config = GPTConfig(139, 16, 2, 4, 24, 5, 40, dropout=dropout, architecture="transformer_xl")
    context = replace(ParallelContext(), recompute=recompute)
    model = build_model(config, context)
    init_weights(model, seed=1)
    batch = random_batch(replace(config, context_length=8), rows)
    predicted = plan(
        config,
        ParallelConfig(1, 1, recompute=recompute),
        Work(rows, batch[0].shape[1], product_bytes=dtype.itemsize),
    )
    with fast_kernels(dtype, context.device), autocast_for(dtype, context.device)():
        assert lattice.kept(model, batch, DropoutSeed(1, 2)) == predicted.memory["activations"]


def test_buckets_are_those_of_the_gradients() -> None:
    sizes = [3, 7_000_000, 5, 6_553_600, 1, 9]
    tensors = [torch.empty(size, device="meta") for size in sizes]
    limit = 25 * 2**20
    filled = [sum(t.numel() * 4 for t in group) for group in buckets(tensors, limit)]
    assert bucket_bytes(sizes, 4) == filled
    assert len(filled) == 5


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tp-size", "4", "--dp-size", "2", "--vocabulary", "50257", "--dtype", "bfloat16"]
    assert plan_command(flags) == 0
    shown = capsys.readouterr().out
    work = Work(8, 256, product_bytes=2)
    config = replace(TrainConfig().model, vocab_size=50257)
    predicted = plan(config, ParallelConfig(4, 2), work)
    for (axis, operation, phase), (calls, payload) in predicted.ledger.items():
        line = next(one for one in shown.split("\n") if f"{axis} {operation} {phase}" in one)
        assert line.split()[3:5] == [f"{calls:,}", f"{payload:,}"]
    assert f"{predicted.memory['activations']:,}" in shown
    assert not torch.distributed.is_initialized()


def test_of_t5_the_two_sides_are_planned_that_a_window_is_divided_into() -> None:
    """Of 256 tokens 38 are cut out in 13 spans: a source has 256 - 38 + 14, a target 38 + 14,
    and both are multiples of 8."""
    model = replace(TrainConfig().model, vocab_size=358, architecture="t5", bias=False)
    config = replace(TrainConfig(), model=model, parallel=ParallelConfig(2, 1))
    rows = config.optim.micro_batch(1)
    expected = plan(model, config.parallel, Work(rows, 56, config.optim.accumulation(1), 232))
    assert plan_training(config, torch.float32) == expected


def test_the_command_takes_all_flags_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    """As a run that is out of memory advises."""
    flags = ["--nproc", "4", "--dp-size", "2", "--grace", "9", "--preset", "default"]
    assert plan_command([*flags, "--vocabulary", "99"]) == 0
    assert "2 tensor-parallel x 2 data-parallel ranks, V 99" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="world size 4 is not tp_size x dp_size = 3 x 1"):
        plan_command(["--nproc", "4", "--tp-size", "3", "--vocabulary", "99"])
