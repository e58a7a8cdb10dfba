"""BERT in layouts against its oracle, and what it is not; the library's own is held elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import tiny_config
from ranks import run_ranks

from rosetrainer.config import ConfigError, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.bert import Bert
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.proof.tolerances import not_proven, prove
from rosetrainer.proof.trajectory import Proof

# tp, dp, what the layout adds, what the model adds, the optimizer.
LAYOUTS: list[tuple[int, int, dict[str, Any], dict[str, Any], Any]] = [
    (4, 1, {"sequence_parallel": True, "recompute": "block"}, {"dropout": 0.1}, "adamw"),
    (
        2,
        2,
        {"recompute": "attention"},
        {"activation": "relu2", "norm_eps": 0.1, "tied": False},
        "muon",
    ),
]


def bert(**changes: Any) -> GPTConfig:
    return tiny_config(**{"context_length": 16, "architecture": "bert", "tied": True, **changes})


def check_layouts() -> None:
    for tp, dp, how, changes, optimizer in LAYOUTS:
        context = init_parallel(ParallelConfig(tp, dp, **how))
        proof = Proof(bert(**changes), context, OptimConfig(optimizer=optimizer))
        assert type(proof.model(ParallelContext(), torch.float64)) is Bert
        assert not_proven(proof) == []
        assert [column.wrong for column in prove(proof)] == [[]]


def test_layouts_equal_the_oracle() -> None:
    """Logits, loss, every gradient, the norm, a clipped step of SGD, and updates, in float64."""
    run_ranks(4, check_layouts)


def test_a_token_sees_both_sides_and_padding_on_neither() -> None:
    model = build_model(bert()).double()
    init_weights(model, seed=3)
    ids = torch.randint(29, (1, 8), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 29
    whole, changed = model(ids)[0], model(other)[0]
    assert (whole - changed).abs().amax(-1).min() > 1e-6
    rows = model(torch.cat([ids, other, ids]))[0]  # of which each is looked at by itself
    torch.testing.assert_close(rows, torch.cat([whole, changed, whole]), rtol=0, atol=1e-12)
    padded = torch.cat([ids[:, :3] * 0, ids, ids[:, :2] * 0 + 4], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 8 + [0] * 2])
    torch.testing.assert_close(model(padded, mask)[0][:, 3:11], whole, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="a row holds no token"):
        model(ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"bias": False}, "architecture=bert has biases; leave out --no-bias"),
        (
            {"activation": "swiglu"},
            "activation=swiglu has a gate, and architecture=bert has none; it can be silu, gelu, "
            "gelu_tanh, relu or relu2",
        ),
        (
            {"n_kv_heads": 2},
            "n_kv_heads=2 is a choice of architecture=llama, and this is bert; add --architecture "
            "llama, or leave it out",
        ),
        (
            {"architecture": "gpt2", "token_types": 3},
            "token_types=3 is a choice of architecture=bert, and this is gpt2; add --architecture "
            "bert, or leave it out",
        ),
    ],
)
def test_choices_that_mean_nothing_together_are_one_line(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        bert(**changes).check()
    assert str(caught.value) == text


def test_a_pipeline_of_it_is_one_line() -> None:
    with pytest.raises(ConfigError, match="architecture=bert runs in no pipeline, and pp_size=2"):
        ParallelConfig(pp_size=2).check_pipeline(bert(), 4)
