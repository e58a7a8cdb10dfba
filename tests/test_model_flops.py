"""A step's floating-point operations: by hand, and as torch counts them in each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rosetrainer.config import GPTConfig
from rosetrainer.model_flops import flops_per_token
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.proof.batches import inputs_of

ROWS, S, T = 3, 8, 16


def test_a_token_s_operations_worked_by_hand() -> None:
    config = GPTConfig(vocab_size=10, context_length=8, n_layers=3, n_heads=2, d_model=4, d_ff=6)
    block = 4 * 12 + 4 * 4 + 4 * 6 + 6 * 4  # q k v, dense, and the two of the feed-forward layer
    attention = 3 * 12 * 8 * 4  # layers x 12 x T x (heads x width)
    assert flops_per_token(config) == 6 * (3 * block + 10 * 4) + attention


FAMILIES: list[dict[str, Any]] = [
    {"architecture": "gpt2"},
    {"architecture": "rotary", "tied": False, "d_head": 6},
    {"architecture": "llama", "n_kv_heads": 2, "tied": False, "d_head": 6},
    {"architecture": "llama", "activation": "gelu", "d_head": 6},
    {"architecture": "bert"},
    {"architecture": "glm"},
    {"architecture": "t5", "bias": False},
    {"architecture": "t5", "bias": False, "activation": "geglu_tanh"},
    {"architecture": "transformer_xl"},
]


@pytest.mark.parametrize(
    "changes", FAMILIES, ids=lambda changes: "-".join(map(str, changes.values()))
)
def test_a_token_s_operations_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """The loss is a plain sum: the head's own one computes logits again."""
    config = tiny_config(context_length=T, vocab_size=128, **changes)
    model = build_model(config, ParallelContext()).double()
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (ROWS, T), generator=generator)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        inputs: Any = inputs_of(config, ids, generator)
        if config.architecture == "t5":  # a shorter source
            inputs = (ids[:, :S], torch.ones(ROWS, S), ids)
        hidden = model.hidden(*inputs)
        model.output_head.logits(hidden).sum().backward()
    counted = counter.get_total_flops()
    if config.architecture == "transformer_xl":  # the distances, once for all rows, are a constant
        width = config.n_heads * config.head_width
        counted -= config.n_layers * 4 * T * config.d_model * width
    if config.architecture == "bert":  # whose head has its bias as a column
        counted -= ROWS * T * 6 * config.vocab_size
    assert counted == ROWS * T * flops_per_token(config, (S, T))
