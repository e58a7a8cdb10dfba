"""Axes and devices: who is whose neighbour, and what is refused before a process group starts."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.environment import choose_device, world_from_environment
from rosetrainer.launch.rank import RENDEZVOUS_DIR
from rosetrainer.parallel.context import ParallelContext, init_parallel, init_tensor_parallel
from rosetrainer.training.setup import check_config, train
from rosetrainer.validation import ConfigError


def axes(parallel: ParallelConfig) -> tuple[int, ...]:
    context = init_parallel(parallel)
    assert context.world_size == 4
    return (context.rank, context.tp.size, context.tp.rank, context.dp.size, context.dp.rank)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    found = run_ranks(4, axes, ParallelConfig(tp_size=2))
    assert found == [(0, 2, 0, 2, 0), (1, 2, 1, 2, 0), (2, 2, 0, 2, 1), (3, 2, 1, 2, 1)]


def test_all_ranks_are_tensor_parallel_unless_told_otherwise() -> None:
    assert [row[1:] for row in run_ranks(4, axes, ParallelConfig())] == [
        (4, r, 1, 0) for r in range(4)
    ]
    assert ParallelConfig(dp_size=4).resolve(4) == (1, 4)


def rank_among_all(parallel: ParallelConfig) -> tuple[int, ...]:
    context = init_parallel(parallel)
    assert context.rank == dist.get_rank()
    return (context.pp.rank, context.dp.rank, context.tp.rank)


def test_ranks_are_counted_over_tp_first_then_dp_then_pp() -> None:
    expected = list(product(range(2), repeat=3))
    assert run_ranks(8, rank_among_all, ParallelConfig(2, 2, pp_size=2)) == expected


def test_alone_there_is_no_process_group() -> None:
    context = init_tensor_parallel()
    assert [(axis.size, axis.rank, axis.group) for axis in context.axes] == [(1, 0, None)] * 3
    assert context.device == torch.device("cpu") or torch.cuda.is_available()
    assert ParallelContext().world_size == 1


@pytest.mark.parametrize(
    "world_size, tp_size, dp_size, message",
    [
        (4, 3, None, "world size 4 is not tp_size x dp_size = 3 x 1; start 3 ranks"),
        (4, 2, 1, "world size 4 is not tp_size x dp_size = 2 x 1; start 2 ranks"),
        (1, 2, None, "world size 1 is not tp_size x dp_size = 2 x 1; start 2 ranks"),
        (2, 0, None, "tp_size=0 must be from 1 to 1099511627776"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    world_size: int, tp_size: int, dp_size: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(tp_size, dp_size).resolve(world_size)


def time_limits(config: TrainConfig, meeting: str) -> list[float]:
    """Seconds, of the world's group, tp's and dp's, as a training run makes them."""
    dist.destroy_process_group()
    os.environ[RENDEZVOUS_DIR] = meeting
    found: list[float] = []

    def look(*arguments: Any) -> ParallelContext:
        context = init_parallel(*arguments)
        for group in (dist.group.WORLD, context.tp.group, context.dp.group):
            assert group is not None
            options = group._get_backend(torch.device("cpu")).options
            found.append(options._timeout.total_seconds())
        return context

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rosetrainer.training.setup.init_parallel", look)
        train(*check_config(config, 4))
    return found


@pytest.mark.parametrize("tp_size", [2, 4])
def test_the_time_limit_is_that_of_all_groups(tp_size: int, markov: Path, tmp_path: Path) -> None:
    model = GPTConfig(context_length=16, n_layers=1, n_heads=4, d_model=32)
    config = TrainConfig(model, ParallelConfig(tp_size), OptimConfig(global_batch_size=4))
    run = {"data": markov, "out": tmp_path / "run"}
    config = config.with_settings(timeout=7200, steps=1, eval_tokens=64, **run)
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    for limits in run_ranks(4, time_limits, config, str(meeting)):
        assert limits == [limits[0]] * 3
        assert limits[0] >= 7200


def test_cuda_that_cannot_work_is_an_error_and_auto_falls_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = str(torch.cuda.device_count() + 1)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_device("auto") == torch.device("cpu")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda"):
        choose_device("cuda")


def test_a_broken_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two' should be a number"):
        world_from_environment()
