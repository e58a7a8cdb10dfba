"""A few updates in each layout against one dense process: losses, norms, parameters, moments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import assert_all_equal, assert_equal, dense_model, gradients, random_batch, tiny_config
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.adamw import AdamW
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.optimizer import build_optimizer, learning_rate
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.data_parallel import buckets
from rosetrainer.parallel.sharding import gather_whole, load_whole, shard_spec
from rosetrainer.training.step import compute_gradients

ROWS, STEPS = 8, 3
OPTIM = OptimConfig(
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.9,
    eps=1e-7,
    global_batch_size=ROWS,
)


def global_batch(config: GPTConfig, step: int) -> tuple[Tensor, Tensor]:
    """Rows with very different numbers of real tokens: a mean of means is not the mean."""
    input_ids, labels = random_batch(config, ROWS, seed=step)
    for row in range(ROWS):
        labels[row, : row + 1] = -100
    return input_ids, labels


def dense_optimizer(dense: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    """Decay for the matrices of linear layers and the token embedding, by name."""
    if kind == "sgd":
        return torch.optim.SGD(dense.parameters(), lr=0.05)
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in dense.named_parameters():
        no_decay = name.endswith("bias") or "norm" in name or "position" in name
        (others if no_decay else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9), eps=1e-7)


def set_rate(optimizer: torch.optim.Optimizer | AdamW, step: int) -> None:
    if not isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)


def train_dense(config: GPTConfig, kind: str, clip: float) -> tuple[torch.nn.Module, list[float]]:
    """The oracle: the whole batch at once, torch's own clipping and optimizer."""
    dense = dense_model(config)
    optimizer = dense_optimizer(dense, kind)
    figures = []
    for step in range(STEPS):
        optimizer.zero_grad()
        set_rate(optimizer, step)
        input_ids, labels = global_batch(config, step)
        _, loss = dense(input_ids, labels=labels)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients(dense).values()]))
        for gradient in gradients(dense).values():
            gradient.mul_(clip / norm if clip and norm > clip else 1.0)
        figures += [loss.item(), norm.item()]
        optimizer.step()
    return dense, figures


def check_training(kind: str, dp_size: int, accumulation: int, clip: float) -> None:
    context = init_parallel(ParallelConfig(dp_size=dp_size))
    config = tiny_config()
    dense, dense_figures = train_dense(config, kind, clip)
    model = GPTModel(config, context).double()
    load_whole(model, dense_model(config).state_dict())
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05)
        if kind == "sgd"
        else build_optimizer(model, OPTIM)
    )
    figures = []
    for step in range(STEPS):
        optimizer.zero_grad()
        set_rate(optimizer, step)
        input_ids, labels = global_batch(config, step)
        own = slice(context.dp.rank, None, dp_size)
        chunks = (whole[own].chunk(accumulation) for whole in (input_ids, labels))
        micro_batches = [(0, *pair) for pair in zip(*chunks, strict=True)]
        loss = compute_gradients(model, micro_batches, context)
        norm = clip_gradients(model, context, clip)
        figures += [loss, norm]
        optimizer.step()
    exact = torch.float64
    ours, expected = (torch.tensor(f, dtype=exact) for f in (figures, dense_figures))
    assert_equal("losses and norms", ours, expected)
    assert_all_equal(gather_whole(model), dict(dense.named_parameters()))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "dp_size, tp_size, accumulation", [(1, 1, 4), (1, 2, 1), (1, 4, 2), (2, 1, 2), (2, 2, 1)]
)
def test_three_updates_equal_one_dense_process(
    kind: str, dp_size: int, tp_size: int, accumulation: int
) -> None:
    # A clip of 0.05 is far below the norm: a wrong norm moves every parameter.
    run_ranks(dp_size * tp_size, check_training, kind, dp_size, accumulation, 0.05)


def test_without_a_limit_the_gradients_stay_as_they_are() -> None:
    run_ranks(2, check_training, "sgd", 1, 1, 0.0)


def check_moments(dp_size: int) -> None:
    """Adam's moments after one update are (1 - beta1) x g and (1 - beta2) x g²."""
    context = init_parallel(ParallelConfig(dp_size=dp_size))
    config = tiny_config()
    dense = dense_model(config)
    input_ids, labels = global_batch(config, 0)
    dense(input_ids, labels=labels)[1].backward()
    model = GPTModel(config, context).double()
    load_whole(model, dense.state_dict())
    own = slice(context.dp.rank, None, dp_size)
    compute_gradients(model, [(0, input_ids[own], labels[own])], context)
    optimizer = build_optimizer(model, OPTIM)
    optimizer.step()
    for key, expected in (
        ("exp_avg", {name: 0.2 * g for name, g in gradients(dense).items()}),
        ("exp_avg_sq", {name: 0.1 * g**2 for name, g in gradients(dense).items()}),
    ):
        moments = {
            name: shard_spec(p).unshard(optimizer.state[p][key], "checkpoint")
            for name, p in model.named_parameters()
        }
        assert_all_equal(moments, expected)


def test_the_moments_equal_dense() -> None:
    run_ranks(4, check_moments, 2)


def test_adamw_is_bitwise_torch_s() -> None:
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    how: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-7}
    groups = [
        [{"params": [p], "weight_decay": 0.3 * i} for i, p in enumerate(o)] for o in (ours, theirs)
    ]
    optimizers = AdamW(groups[0], **how), torch.optim.AdamW(groups[1], **how, fused=True)
    for step in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[1]["lr"] = 0.1 / (step + 1)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        if step == 2:
            ours[0].grad = theirs[0].grad = None  # passed over
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        states = optimizers[0].state[mine], optimizers[1].state[other]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def check_batches_count_once() -> None:
    context = init_parallel(ParallelConfig(dp_size=2))
    model = GPTModel(tiny_config(), context).double()
    load_whole(model, dense_model(tiny_config()).state_dict())
    input_ids, labels = random_batch(tiny_config(), 2)
    empty = labels.masked_fill(torch.tensor(context.dp.rank == 1), -100)
    loss = compute_gradients(model, [(0, input_ids, empty)], context)
    alone = model(input_ids, labels=labels)[1].item()
    assert loss == pytest.approx(alone, rel=1e-12), "a rank without labels must not count"


def test_a_rank_without_labels_does_not_count() -> None:
    run_ranks(2, check_batches_count_once)


def test_the_schedule_warms_up_and_ends_at_its_floor() -> None:
    config = OptimConfig(learning_rate=1.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.75)  # a third of the way down a cosine
    line = [learning_rate(replace(config, schedule="linear"), step, 20) for step in range(20)]
    assert line[:4] == rates[:4]
    assert line[4:] == pytest.approx([0.1 + 0.9 * (1 - n / 16) for n in range(16)])
    for schedule in ("linear", "cosine"):
        stable = replace(config, schedule=schedule, stable_ratio=0.25)
        rates = [learning_rate(stable, step, 24) for step in range(24)]
        shorter = [learning_rate(replace(stable, stable_ratio=0), step, 19) for step in range(19)]
        assert rates == pytest.approx([*shorter[:4], *[1.0] * 5, *shorter[4:]])


def test_buckets_hold_every_tensor_once_in_order() -> None:
    tensors = [torch.zeros(n) for n in (3, 5, 100, 1, 2)] + [torch.zeros(2, dtype=torch.float64)]
    grouped = list(buckets(tensors, limit_bytes=32))
    assert [[t.numel() for t in group] for group in grouped] == [[3, 5], [100], [1, 2], [2]]
    flat = [t for group in grouped for t in group]
    assert all(a is b for a, b in zip(flat, tensors, strict=True))
