"""Our runner beside torch.distributed.pipelining's: the same stages, weights and micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pipelines
import pytest
import torch
import torch.nn.functional as F
from oracle import TOLERANCE
from pipelines import Layout
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from rosetrainer.config import IGNORED
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.pipeline.stage import Stage, stages_of_rank
from rosetrainer.training.step import compute_gradients

LAYOUT = Layout(2, "1f1b", 5, 5, tied=False)  # tied, torch would not sum the table's gradients


class AsModule(nn.Module):
    """A stage of ours as torch runs it: one tensor in and one out, logits from the last one."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, x: Tensor) -> Tensor:
        ids = x if self.stage.is_first else x[..., 0]  # of which the others need the shape only
        y = self.stage.hidden(x, ids, None)
        logits: Tensor = self.stage.model.output_head.logits(y) if self.stage.is_last else y
        return logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def both(schedule: str) -> tuple[float, int, set[str]]:
    """The largest difference of a gradient as a share of it; how many; and their names."""
    context = init_parallel(replace(LAYOUT, schedule=schedule).parallel)
    model = pipelines.build(LAYOUT, context)
    ids, labels = pipelines.batch(LAYOUT, 0)
    rows = range(0, LAYOUT.rows, pipelines.ROWS_EACH)
    parts = [slice(row, row + pipelines.ROWS_EACH) for row in rows]
    compute_gradients(model, [(part.start, ids[part], labels[part]) for part in parts], context)
    ours = gradients(model)
    model.zero_grad()
    ((number, own),) = stages_of_rank(model, context).items()
    tokens, b, T = int((labels != IGNORED).sum()), pipelines.ROWS_EACH, pipelines.T
    hidden = torch.zeros(b, T, LAYOUT.model.d_model, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(b, T, 256, dtype=torch.float64, requires_grad=True)

    def loss(found: Tensor, target: Tensor) -> Tensor:
        real = found[..., :139].flatten(0, 1)  # without the pad
        return F.cross_entropy(real, target.flatten(), reduction="sum") / tokens

    stage = PipelineStage(
        AsModule(model, own),
        number,
        2,
        torch.device("cpu"),
        input_args=ids[parts[0]] if own.is_first else hidden,
        output_args=logits if own.is_last else hidden,
        group=context.pp.group,
    )
    cls: Any = {"1f1b": Schedule1F1B, "afab": ScheduleGPipe}[schedule]
    run = cls(stage, LAYOUT.micro_batches, loss_fn=loss, scale_grads=False)
    if own.is_first:
        run.step(ids)
    else:
        run.step(target=labels)
    theirs = gradients(model)
    assert theirs.keys() == ours.keys()
    worst = max(
        float((ours[n] - t).abs().max() / t.abs().max()) for n, t in theirs.items() if t.any()
    )
    return worst, sum(bool(t.any()) for t in theirs.values()), set(theirs)


@pytest.mark.parametrize("schedule", ["1f1b", "afab"])
def test_gradients_are_those_of_torch_s_runtime(schedule: str) -> None:
    found = run_ranks(2, both, schedule)
    assert all(worst <= TOLERANCE for worst, _, _ in found), found
    assert set().union(*(names for _, _, names in found)) == set(
        pipelines.whole_weights(LAYOUT.model)
    )
    assert sum(alive for _, alive, _ in found) == sum(len(names) for _, _, names in found)
