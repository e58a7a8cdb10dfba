"""A spec that cuts over two axes, and one that only some ranks hold: each reader against dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from rosetrainer.checkpoint.manifest import Progress, from_format_2, read_manifest
from rosetrainer.checkpoint.ownership import owned_slices
from rosetrainer.checkpoint.saver import own_part, read_whole
from rosetrainer.checkpoint.slices import Draft
from rosetrainer.config import ParallelConfig, TrainConfig
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.replicas import ReplicaError, check_replicas
from rosetrainer.parallel.sharding import (
    Cut,
    ShardSpec,
    draw_whole,
    gather_whole,
    init_weights,
    new_parameter,
    shard_spec,
)


class Parameters(nn.Module):
    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        shard, tp = context.dp, context.tp
        both = Cut(tp, 1), Cut(shard, 1)
        specs = {
            "fused": ShardSpec((3, 5, 8), (Cut(tp, 2), Cut(shard, 1)), 3, pad=(0, 1, 0)),
            "rows_and_columns": ShardSpec((6, 4), (Cut(tp, 0), Cut(shard, 1))),
            "twice_the_same": ShardSpec((2, 9), both, pad=(0, 3)),  # slices 3, 3, 3 and 0 wide
            "over_shard": ShardSpec((7,), (Cut(shard),), pad=(1,)),
            "replicated": ShardSpec((3,)),
        }
        for name, spec in specs.items():
            setattr(self, name, new_parameter(replace(spec, init_std=1.0)))
        expert = ShardSpec((4, 2), (Cut(tp, 0), Cut(shard, ranks=(shard.rank,))), init_std=1.0)
        setattr(self, f"expert_{shard.rank}", new_parameter(expert))


def check_two_axes(run: Path) -> None:
    made = init_parallel(ParallelConfig(dp_size=2))
    context = replace(made, dp=replace(made.dp, name="shard"))
    shard, tp = context.dp, context.tp
    model = Parameters(context)
    init_weights(model, 3)
    specs = {name: shard_spec(parameter) for name, parameter in model.named_parameters()}
    names = [name for name in specs if "expert" not in name] + ["expert_0", "expert_1"]
    expert = specs[f"expert_{shard.rank}"]
    dense = {name: draw_whole(specs.get(name, expert), 3, name) for name in names}
    assert model.fused.shape == (3, 3, 4) and model.twice_the_same.shape == (2, 3)
    gathered = gather_whole(model)
    assert len(gathered) == 6
    for name, whole in gathered.items():
        assert whole.equal(dense[name]), name
    partial = {
        axis.name: [n for n, s in specs.items() if s.is_partial(axis)] for axis in (shard, tp)
    }
    assert partial == {"shard": ["replicated"], "tp": []}

    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    norm = torch.stack([whole.double().norm() for whole in dense.values()]).norm()
    assert clip_gradients(model, context, 0.0) == pytest.approx(float(norm), rel=1e-6)

    tensors, slices, need = owned_slices(model, AdamW([]), context, copy=True)
    draft = Draft(run, 1, "once")
    draft.write_part(context.rank, tensors, slices, need)
    if context.rank == 0:
        draft.complete(4, Progress(1, 1, 0, 0, "float32", {}, TrainConfig()))
    dist.barrier()
    manifest = read_manifest(run / "step_000001")
    parts = {name: len(saved.slices) for name, saved in manifest.tensors.items()}
    assert parts == {
        "fused": 4,
        "rows_and_columns": 4,
        "twice_the_same": 3,
        "over_shard": 2,
        "replicated": 1,
        "expert_0": 2,
        "expert_1": 2,
    }
    for name, parameter in model.named_parameters():
        assert own_part(run / "step_000001", manifest, name, parameter).equal(parameter), name
    for name, whole in dense.items():
        read = read_whole(run / "step_000001", manifest, name)
        assert read.reshape(whole.shape).equal(whole), name

    check_replicas(model, context, 1)
    if context.rank == 3:
        model.get_parameter("over_shard").data[0] += 1  # over tp it is replicated
    with pytest.raises(ReplicaError, match="rank 3 holds another over_shard than rank 2"):
        check_replicas(model, context, 1)


def test_a_parameter_cut_over_two_axes_and_one_of_some_ranks_are_read_as_their_wholes(
    tmp_path: Path,
) -> None:
    run_ranks(4, check_two_axes, tmp_path)


def test_slices_of_format_2_lay_along_one_dimension() -> None:
    one = {"file": "rank_00000.safetensors", "start": 2, "stop": 5}
    old = {"shape": [4, 6], "dtype": "float32", "dim": 1, "slices": [one]}
    (new,) = from_format_2(old)["slices"]
    assert new == {"file": "rank_00000.safetensors", "first": [0, 2], "size": [4, 3]}
    assert "dim" not in old
