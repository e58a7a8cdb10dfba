"""Every pair of settings that train takes, in each dtype, on one rank and on two."""

from __future__ import annotations

import functools
import math
import os
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pairwise
import pytest
import torch
from lattice import relative
from numpy.random import default_rng
from ranks import run_ranks
from torch import Tensor

from rosetrainer import train as training
from rosetrainer.attention import BLOCK, KEPT
from rosetrainer.blocks import build_model
from rosetrainer.checkpoint import own_range
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from rosetrainer.fields import ConfigError
from rosetrainer.optim import build_optimizer
from rosetrainer.parallel_context import ParallelContext, init_parallel
from rosetrainer.precision import autocast_for
from rosetrainer.products import fast_products
from rosetrainer.tensor_parallel import draw_whole, init_weights, load_whole, shard_spec
from rosetrainer.training_step import train_step

VOCABULARY, ROWS = 200, 4
# Of what decides numbers; a context length below, at and above what attention takes at once.
NUMBERS: dict[str, tuple[Any, ...]] = {
    "ranks": ((1, 1), (2, 1), (1, 2)),  # tp, dp
    # One factor: what attention computes depends on both, and on the length.
    "architecture, dropout": (("gpt2", 0.0), ("gpt2", 0.1), ("rotary", 0.0), ("rotary", 0.1)),
    "context_length": (6, BLOCK, BLOCK + 2, KEPT + 2),
    "recompute": ("none", "attention", "block"),
    "sequence_parallel": (False, True),
    "overlap": (True, False),
    "tied": (True, False),
    "bias": (True, False),
    "d_head": (6, 5),
    "d_ff": (None, 22),
    "rotary_base": (10000.0, 50.0),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear"),
    "head_learning_rate": (None, 0.002),
    "grad_clip": (1.0, 0.0),
    "micro_batch_size": (None, 1),
}
# Of what a run does besides; seven steps, of which the profiler records one.
RUN: dict[str, tuple[Any, ...]] = {
    "ranks": NUMBERS["ranks"],
    "dtype": ("float32", "bfloat16", "float64", "auto"),
    "architecture, dropout": NUMBERS["architecture, dropout"],
    "optimizer": ("adamw", "muon"),
    "recompute": ("none", "attention", "block"),
    "async_checkpoint": (False, True),
    "deterministic": (False, True),
    "check_replicas": (0, 2),
    "profile": (0, 1),
    "compile": ("auto", "off"),
    "checkpoint_every": (0, 3),
    "keep": (1, 3),
    "eval_every": (0, 2),
    "eval_tokens": (1, 100),
    "resume": ("auto", "never"),
    "max_skipped": (0, 2),
    "seed": (0, 2**40),
    "threads": (0, 1),
    "warmup_steps": (0, 2, 50),
    "min_lr_ratio": (0.0, 1.0),
    "eps": (1e-8, 1e-20),
}
# Bounds of |ours - float64's| / largest for the loss and each gradient. They were up to 7e-8 and
# 1e-6, and 4e-4 and 0.04, in bf16; with its mask off by one 1e-3 to 2e-2 and 0.3 to 1.
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 0.1)}


def config_of(factors: dict[str, Any], row: pairwise.Row) -> TrainConfig:
    """The config of a row of factors' values, each field in the component that has it."""
    values = dict(zip(factors, row, strict=True))
    tp_size, dp_size = values.pop("ranks")
    values["architecture"], values["dropout"] = values.pop("architecture, dropout")
    tied = values["architecture"] != "rotary"
    shape = {"n_layers": 2, "n_heads": 4, "d_model": 24, "context_length": 8, "tied": tied}
    config = TrainConfig(
        GPTConfig(VOCABULARY, **shape),
        ParallelConfig(tp_size, dp_size),
        OptimConfig(global_batch_size=ROWS, warmup_steps=0, weight_decay=0.0),
        RunConfig(steps=7),
    )
    for part in ("model", "parallel", "optim", "run"):
        component = getattr(config, part)
        here = {name: value for name, value in values.items() if hasattr(component, name)}
        config = replace(config, **{part: replace(component, **here)})
    return config


def world_of(config: TrainConfig) -> int:
    return (config.parallel.tp_size or 1) * (config.parallel.dp_size or 1)


def refusal(row: pairwise.Row) -> str:
    """What a user is told of the row; "" if it can be trained."""
    config = config_of(NUMBERS, row)
    try:
        config.check(world_of(config))
    except ConfigError as error:
        return str(error)
    return ""


@functools.cache
def numbers() -> list[TrainConfig]:
    allowed = pairwise.rows(list(NUMBERS.values()), lambda row: not refusal(row))
    return [config_of(NUMBERS, row) for row in allowed]


class Noise:
    """A corpus of rows without any order."""

    def __init__(self, length: int) -> None:
        self.length = length

    def train_batch(self, _seed: int, step: int, batch: int, rows: range) -> Any:
        drawn = default_rng(step).integers(VOCABULARY, size=(2, batch, self.length))
        return drawn[:, rows.start : rows.stop]


def one_step(
    config: TrainConfig, context: ParallelContext, dtype: torch.dtype, noisy: bool
) -> dict[str, Any]:
    """The loss, the gradients as the optimizer met them, and which parameters it left alone."""
    model = build_model(config.model, context)
    if dtype == torch.float64:
        model.double()
    init_weights(model, 1)
    if noisy:  # no bias zero, no norm one, no head without a gradient behind it
        specs = {name: shard_spec(parameter) for name, parameter in model.named_parameters()}
        stds = {
            name: replace(spec, init_std=max(spec.init_std, 0.2)) for name, spec in specs.items()
        }
        load_whole(model, {name: draw_whole(spec, 2, name) for name, spec in stds.items()})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, gradients = build_optimizer(model, config.optim), dict[str, Tensor]()
    update = optimizer.step

    def step() -> None:
        gradients.update({n: p.grad.double().clone() for n, p in model.named_parameters()})  # type: ignore[union-attr]
        update()

    optimizer.step = step  # type: ignore[method-assign]
    corpus: Any = Noise(config.model.context_length)
    autocast = autocast_for(dtype, context.device)
    with fast_products(dtype, context.device):
        figures = train_step(config, corpus, model, optimizer, context, autocast, 0)
    still = [name for name, parameter in model.named_parameters() if parameter.equal(before[name])]
    return {"loss": figures["train/loss"], "gradients": gradients, "still": still}


def problems(config: TrainConfig, context: ParallelContext) -> list[str]:
    """What is wrong on this rank with a step of the config, in any dtype."""
    found: list[str] = []
    exact = one_step(config, context, torch.float64, noisy=True)
    largest = max(float(gradient.abs().max()) for gradient in exact["gradients"].values())
    found += [f"float64: {name} did not move" for name in exact["still"]]
    fresh = one_step(config, context, torch.bfloat16, noisy=False)
    if not abs(fresh["loss"] - math.log(VOCABULARY)) < 0.05:
        found.append(f"the first loss is {fresh['loss']}")
    for dtype, (loss, gradient) in BOUNDS.items():
        ours = one_step(config, context, dtype, noisy=True)
        found += [f"{dtype}: {name} did not move" for name in ours["still"]]
        if not abs(ours["loss"] - exact["loss"]) <= loss * exact["loss"]:
            found.append(f"{dtype}: loss {ours['loss']} and not {exact['loss']}")
        for name, expected in exact["gradients"].items():
            scale = max(float(expected.abs().max()), 0.01 * largest)
            error = relative(ours["gradients"][name], expected, scale)
            if not error <= gradient:
                found.append(f"{dtype}: the gradient of {name} is off by {error:.2g}")
    return found


def check_numbers(configs: list[TrainConfig]) -> dict[int, list[str]]:
    checked = ((n, problems(c, init_parallel(c.parallel))) for n, c in enumerate(configs))
    return {n: found for n, found in checked if found}


@pytest.mark.parametrize("world", [1, 2])
def test_settings_that_decide_numbers_meet_in_every_dtype(world: int) -> None:
    configs = [config for config in numbers() if world_of(config) == world]
    for found in run_ranks(world, check_numbers, configs):
        assert not found, "\n".join(f"{configs[n]}\n  {texts}" for n, texts in found.items())


def test_pairs_that_are_not_trained_are_refused_in_one_line() -> None:
    rows = pairwise.rows(list(NUMBERS.values()), lambda row: not refusal(row))
    assert pairwise.pairs_never_met(NUMBERS, rows) == {
        *(
            ("architecture, dropout", ("rotary", dropout), *refused)
            for dropout, refused in product((0.0, 0.1), (("tied", True), ("d_head", 5)))
        ),
        ("tied", True, "head_learning_rate", 0.002),
    }
    refused = [text for row in pairwise.rows(list(NUMBERS.values())) if (text := refusal(row))]
    assert refused
    for text in refused:
        assert "\n" not in text
        assert any(name in text for name in ("architecture=rotary", "head_learning_rate=0.002"))


def train_all(configs: list[TrainConfig]) -> list[list[str]]:
    """For each config, in turn, which parameters of its run did not move."""
    world, found = int(os.environ["WORLD_SIZE"]), []
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(training, "matmul_peak", lambda *_: 1.0)  # a third of a second
        patch.setattr(training, "end_parallel", lambda: None)  # the next config needs the group
        for config in configs:
            checked, corpus = training.check_config(config, world)
            model, stopped = training.train(checked, corpus)
            torch.use_deterministic_algorithms(False)
            assert stopped is None
            own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            init_weights(model, config.run.seed)
            here = {n: own_range(shard_spec(p)) for n, p in model.named_parameters()}
            real = [(n, p) for n, p in model.named_parameters() if here[n][0] < here[n][1]]
            found.append([n for n, p in real if p.equal(own[n])])  # besides what is pad alone
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_settings_of_a_run_meet(world: int, markov: Path, tmp_path: Path) -> None:
    configs: list[TrainConfig] = []
    for row in pairwise.rows(list(RUN.values())):
        config = config_of(RUN, row)
        if world_of(config) == world:
            run = replace(config.run, data=markov, out=tmp_path / f"run-{len(configs)}")
            configs.append(replace(config, run=run))
    for found in run_ranks(world, train_all, configs):
        for config, still in zip(configs, found, strict=True):
            assert not still, config
