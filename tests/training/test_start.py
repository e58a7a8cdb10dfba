"""What a rank holds while a run begins."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peak import Peak
from runs import tiny

from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.parallel.sharding import draw_whole, shard_spec
from rosetrainer.parallel.zero.sharded_model import sharding_of
from rosetrainer.training.open_run import RunLocation
from rosetrainer.training.setup import build

DP = 8


@pytest.mark.parametrize("level", [1, 3])
def test_a_model_begins_in_slices(level: int, tmp_path: Path) -> None:
    """A start moves nothing between ranks, so that one of them can be looked at alone."""
    config = tiny(tmp_path, tmp_path, d_model=64, n_heads=4, n_layers=8, dp_size=DP, zero=level)
    config = config.with_settings(freeze="blocks.2.*,*norm*", optimizer="muon", tied=False)
    context = ParallelContext(dp=Axis("dp", DP, 5, divides_batch=True), parallel=config.parallel)
    with Peak() as peak:
        model, *_ = build(config, RunLocation(tmp_path, "", None, None), context, torch.bfloat16)
    sharded, whole = sharding_of(model), 0
    assert sharded
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        drawn = draw_whole(spec, config.run.seed, name)
        assert torch.equal(parameter, spec.shard(drawn))
        assert parameter.requires_grad == (".2." not in name and "norm" not in name)
        whole += drawn.nbytes
    units = [*sharded.units, *getattr(sharded, "frozen", [])]
    slices = sum(unit.row.nbytes for unit in units)
    largest = max(sum(math.prod(s.gathered_shape) for s in unit.specs) for unit in units) * 4
    if level == 3:  # a unit is there whole, and in bf16 what of it is multiplied
        assert peak.bytes <= slices + largest * 3 // 2 < whole / 2
    else:
        assert peak.bytes > whole
