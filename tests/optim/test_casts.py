"""Each weight is cast once a step, and what is computed with it stays bitwise alike."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from oracle import random_batch, tiny_config
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rosetrainer.config import OptimConfig, ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.optim.frozen import freeze
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.optim.precision import autocast_for
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.training.step import compute_gradients

CPU, MICRO_BATCHES, STEPS = torch.device("cpu"), 3, 3
CONFIG = replace(tiny_config(), d_head=4, n_layers=4)


class Casts(TorchDispatchMode):
    """How often each of these parameters, whole or in another shape, becomes bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if p.dim() > 1}
        self.counts = dict.fromkeys(self.names.values(), 0)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.counts[self.names[args[0].data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


def train(context: ParallelContext, once: bool) -> tuple[dict[str, int], list[Any]]:
    """The casts in STEPS steps, and each step's loss and gradients, then the weights."""
    torch.use_deterministic_algorithms(True)
    model = build_model(CONFIG, context)
    init_weights(model, 1)
    if context.pp.size == 1:
        freeze(model, "blocks.0.*")
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
    rows = [random_batch(CONFIG, 2, seed) for seed in range(MICRO_BATCHES)]
    batches = [(2 * number, *pair) for number, pair in enumerate(rows)]
    found: list[Any] = []
    plain = patch("rosetrainer.training.step.weights_cast_once", lambda adds=False: nullcontext())
    with Casts(model) as casts, nullcontext() if once else plain:
        for _ in range(STEPS):
            optimizer.zero_grad()
            autocast = autocast_for(torch.bfloat16, CPU)
            loss = compute_gradients(model, batches, context, autocast)
            found.append(
                (loss, [p.grad.tolist() for p in model.parameters() if p.grad is not None])
            )
            optimizer.step()
    found.append([p.tolist() for p in model.parameters()])
    return casts.counts, found


def compare(layout: ParallelConfig) -> tuple[dict[str, int], dict[str, int], bool]:
    context = init_parallel(layout)
    once, ours = train(context, once=True)
    each, plain = train(context, once=False)
    return once, each, ours == plain


LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "recomputed": (1, ParallelConfig(recompute="block")),
    "tp, sequence parallel": (2, ParallelConfig(2, sequence_parallel=True)),
    "tp, overlapped": (2, ParallelConfig(2, overlap=True)),
    "1f1b": (2, ParallelConfig(pp_size=2)),
    "zero-bubble": (2, ParallelConfig(pp_size=2, pp_schedule="zero-bubble")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_is_cast_once_a_step_and_nothing_is_rounded_otherwise(name: str) -> None:
    for once, each, equal in run_ranks(LAYOUTS[name][0], compare, LAYOUTS[name][1]):
        assert equal
        multiplied = {weight for weight, count in each.items() if count}
        assert any("query_key_value" in weight for weight in multiplied)
        for weight in multiplied:
            assert (once[weight], each[weight] >= MICRO_BATCHES * STEPS) == (STEPS, True), weight


def test_gradients_come_last_block_first_in_each_micro_batch() -> None:
    """So that their sums can travel meanwhile, though the copy is of the first micro-batch."""
    model = build_model(CONFIG)
    init_weights(model, 1)
    came: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
    batches = [(2 * i, *random_batch(CONFIG, 2, i)) for i in range(MICRO_BATCHES)]
    compute_gradients(model, batches, ParallelContext(), autocast_for(torch.bfloat16, CPU))
    weights = [name for name in came if name.endswith("dense_4h_to_h.weight")]
    each = [f"blocks.{i}.feed_forward.dense_4h_to_h.weight" for i in (3, 2, 1, 0)]
    assert weights == each * MICRO_BATCHES
    count = len(came) // MICRO_BATCHES
    for start in range(0, len(came), count):
        blocks = [int(n.split(".")[1]) for n in came[start : start + count] if "blocks" in n]
        assert blocks == sorted(blocks, reverse=True)
