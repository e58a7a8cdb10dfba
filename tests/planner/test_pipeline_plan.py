"""What plan says of a pipeline's ranks, beside figures that were counted."""

from __future__ import annotations

import pipelines
import pytest
import torch
from lattice import saved_by
from pipelines import Layout
from ranks import run_ranks

from rosetrainer.commands.plan import main as plan_command
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.pipeline.stage import stages_of_rank
from rosetrainer.planner.activations import activations
from rosetrainer.planner.layout import plan
from rosetrainer.planner.pipeline import live_bytes, shares_of_rank
from rosetrainer.planner.shares import Work
from rosetrainer.validation import ConfigError

LAYOUTS = {
    "1f1b": Layout(3, "1f1b", 5, 5, tied=False),
    "tied": Layout(2, "afab", 3, 5),
    "recompute": Layout(2, "interleaved", 4, 7, tp=2, recompute="attention"),
    "block": Layout(2, "1f1b", 3, 5, tp=2, recompute="block", sequence_parallel=True),
    "split": Layout(2, "zero-bubble", 3, 5, tp=2, dropout=0.1),
    "split, by tokens": Layout(2, "zero-bubble-v", 3, 5, tp=2, sequence_parallel=True),
}


def kept(layout: Layout) -> tuple[dict[int, int], int]:
    """Bytes that autograd saves of one micro-batch in each stage; bytes of the parameters."""
    context = init_parallel(layout.parallel)
    model = pipelines.build(layout, context)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids, labels = (one[: pipelines.ROWS_EACH] for one in pipelines.batch(layout, 0))
    found = {}
    for number, stage in stages_of_rank(model, context).items():
        x = None if stage.is_first else torch.ones_like(stage.input_buffer(ids)).requires_grad_()

        def forward(stage=stage, x=x) -> object:
            y = stage.hidden(x, ids, DropoutSeed(1, 0))
            return stage.model.output_head.loss(y, labels) if stage.is_last else y

        saved = saved_by(forward)
        found[number] = sum(size for address, size in saved.items() if address not in weights)
    return found, sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_rank_holds_is_what_was_counted(name: str) -> None:
    layout = LAYOUTS[name]
    work = Work(pipelines.ROWS_EACH, pipelines.T, layout.micro_batches, 0, 8, 8)
    for rank, (of_stage, weights) in enumerate(run_ranks(layout.pp * layout.tp, kept, layout)):
        pp_rank = rank // layout.tp
        predicted = plan(layout.model, layout.parallel, work, pp_rank)
        assert predicted.memory["parameters"] == weights
        together = live_bytes(layout.parallel, pp_rank, layout.micro_batches, of_stage)
        assert predicted.memory["activations"] == together


def test_a_rank_of_1f1b_holds_as_many_micro_batches_as_ranks_follow() -> None:
    layout = LAYOUTS["1f1b"]
    work = Work(2, 8, 5)
    for rank in range(3):
        share = shares_of_rank(layout.model, layout.parallel, rank)[rank]
        one = activations(layout.model, layout.parallel, work, share)
        held = plan(layout.model, layout.parallel, work, rank).memory["activations"]
        assert held == (3 - rank) * one


def test_the_command_shows_every_rank_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--vocabulary", "256", "--n-layers", "5", "--micro-batch-size", "4"]
    assert plan_command(["--pp-size", "2", *shape]) == 0
    shown = capsys.readouterr().out
    assert "1 tensor-parallel x 1 data-parallel x 2 pipeline-parallel ranks, V 256" in shown
    assert "1f1b, 4 micro-batches: " in shown
    assert "a rank waits for 20.0% of the step, and a step takes 25.0% longer" in shown
    assert "pp rank 0: blocks 0-2; " in shown
    assert "pp rank 1: blocks 3-4; " in shown
    size = 4 * 256 * 256 * 4
    assert f"  pp send forward                        4 {4 * size:15,} {4 * size:15,}" in shown
    with pytest.raises(ConfigError, match="^pp_size=6 x 1 stages of a rank are more than"):
        plan_command(["--pp-size", "6", *shape])
