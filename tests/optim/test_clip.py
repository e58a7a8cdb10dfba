"""The global norm of gradients of any finite size, in every layout, and clipping by it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from oracle import tiny_config
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.optim.non_finite import NonFiniteGradientError
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.sharding import init_weights, shard_spec
from rosetrainer.training.trainer import train_step

# Squares of fp32 are infinite from 1.8e19 on and lose digits below 1e-19; float64's at 1e154.
SIZES = {
    torch.float32: (1e-44, 1e-30, 1e-20, 1e-12, 1.0, 1e15, 1e19, 1e30, 3e38),
    torch.float64: (5e-324, 1e-300, 1e-170, 1e-12, 1.0, 1e19, 1e160, 1e300),
}


def whole_gradients(dtype: torch.dtype, size: float) -> dict[str, Tensor]:
    """Of one process: the largest number of all is `size`, and lies in one parameter alone."""
    generator = torch.Generator().manual_seed(1)
    whole = {}
    for name, parameter in GPTModel(tiny_config()).named_parameters():
        shape = shard_spec(parameter).dense_shape
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        whole[name] = (drawn * size * 1e-2).to(dtype)
    whole["blocks.1.attention.query_key_value.weight"][0, 0] = size  # on the first rank of tp
    return whole


def true_norm(whole: dict[str, Tensor]) -> float:
    """By sums that are exact, of numbers divided by the largest."""
    numbers = torch.cat([tensor.flatten().double() for tensor in whole.values()])
    scale = float(numbers.abs().max())
    return scale * math.sqrt(math.fsum(x * x for x in (numbers / scale).tolist()))


def with_gradients(context: ParallelContext, whole: dict[str, Tensor]) -> GPTModel:
    model = GPTModel(tiny_config(), context).to(next(iter(whole.values())).dtype)
    for name, parameter in model.named_parameters():
        parameter.grad = shard_spec(parameter).shard(whole[name])
    return model


def check_sizes(parallel: ParallelConfig) -> None:
    context = init_parallel(parallel)
    for dtype, sizes in SIZES.items():
        exact = 1e-6 if dtype == torch.float32 else 1e-14
        for size in sizes:
            whole = whole_gradients(dtype, size)
            model, expected = with_gradients(context, whole), true_norm(whole)
            norm = clip_gradients(model, context, 0.0)
            assert norm == pytest.approx(expected, rel=exact), (dtype, size)
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                assert parameter.grad.equal(shard_spec(parameter).shard(whole[name])), name
            limit = min(expected / 3, 1.0)
            assert clip_gradients(model, context, limit) == norm
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                scaled = (whole[name].double() * (limit / expected)).to(dtype)
                own, tiny = shard_spec(parameter).shard(scaled), torch.finfo(dtype).smallest_normal
                torch.testing.assert_close(parameter.grad, own, rtol=exact, atol=tiny)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_finite_gradients_of_any_size_have_a_finite_norm(tp_size: int) -> None:
    run_ranks(tp_size, check_sizes, ParallelConfig(tp_size))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_in_the_norm(size: float, bad: float) -> None:
    whole = whole_gradients(torch.float32, size)
    whole["final_norm.weight"][3] = bad
    norm = clip_gradients(with_gradients(ParallelContext(), whole), ParallelContext(), 1.0)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


def test_gradients_of_zero_have_a_norm_of_zero() -> None:
    whole = {name: torch.zeros_like(t) for name, t in whole_gradients(torch.float32, 1.0).items()}
    assert clip_gradients(with_gradients(ParallelContext(), whole), ParallelContext(), 1.0) == 0


class Ones:
    """A corpus of one token."""

    def train_batch(self, _seed: int, _step: int, _batch: int, rows: range) -> Any:
        return np.ones((2, len(rows), 8), np.int64)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_gradient_whose_square_no_moment_holds_is_clipped_or_no_update(
    grad_clip: float, optimizer: Any
) -> None:
    """AdamW's second moment would be infinite, and its parameter would never move again."""
    optim = OptimConfig(grad_clip=grad_clip, optimizer=optimizer, global_batch_size=2)
    config, model = TrainConfig(tiny_config(), optim=optim), GPTModel(tiny_config())
    init_weights(model, 0)
    first = model.get_parameter("blocks.0.attention.dense.weight")
    first.register_hook(lambda gradient: gradient * 1e25)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adamw = build_optimizer(model, optim)

    def step() -> dict[str, float]:
        corpus: Any = Ones()
        return train_step(config, corpus, model, adamw, ParallelContext(), nullcontext, 0)

    if grad_clip == 0:
        with pytest.raises(NonFiniteGradientError, match=r"norm is .*e\+2.*grad_clip"):
            step()
        assert all(before[name].equal(new) for name, new in model.named_parameters())
        assert not adamw.state
        return
    assert 1e20 < step()["train/grad_norm"] < math.inf
    state = [tensor for p in model.parameters() for tensor in adamw.state[p].values()]
    assert all(tensor.isfinite().all() for tensor in [*state, *model.parameters()])
    assert not first.equal(before["blocks.0.attention.dense.weight"])
