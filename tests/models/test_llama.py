"""The Llama family, in each of its choices and layouts, against its oracle; and its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from oracle import assert_equal, assert_padding_moves_nothing, random_batch, tiny_config
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import ConfigError, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.llama import ACTIVATIONS, GATES, Llama, RMSNorm
from rosetrainer.models.positions import turn, turning
from rosetrainer.optim.clip import clip_gradients
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.data_parallel import accumulate_gradients, reduce_gradients
from rosetrainer.parallel.replicas import check_replicas
from rosetrainer.parallel.sharding import gather_whole, init_weights, shard_spec
from rosetrainer.proof.oracles import build_reference
from rosetrainer.proof.tolerances import not_proven, prove
from rosetrainer.proof.trajectory import Proof


def llama(**changes: Any) -> GPTConfig:
    shape = {"context_length": 16, "d_head": 6, "architecture": "llama", "bias": False}
    return tiny_config(**{**shape, "tied": False, "n_kv_heads": 2, **changes})


# tp, dp, what the layout adds, what the model adds, the optimizer.
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any], Any]] = {
    "one-process": (1, 1, {}, {}, "adamw"),
    "tp2-one-head-each": (2, 1, {}, {}, "adamw"),
    "tp2-as-many-heads": (2, 1, {}, {"n_kv_heads": None, "tied": True}, "adamw"),
    "tp4-two-hold-a-head": (4, 1, {}, {"bias": True, "qk_norm": True}, "adamw"),
    "tp4-all-hold-the-head": (4, 1, {"overlap": False}, {"n_kv_heads": 1}, "muon"),
    "tp8-two-of-four-hold": (8, 1, {}, {"n_kv_heads": 4, "qkv_bias": True}, "adamw"),
    "dp2": (1, 2, {}, {"n_kv_heads": 1, "dense_bias": True}, "muon"),
    "tp2-dp2-sequence-parallel": (
        *(2, 2, {"sequence_parallel": True}),
        *({"n_kv_heads": 1, "qk_norm": True, "qkv_bias": True}, "adamw"),
    ),
    "tp4-sequence-parallel-dropout": (
        *(4, 1, {"sequence_parallel": True}),
        *({"dropout": 0.1, "norm": "layernorm", "bias": True}, "adamw"),
    ),
    "tp2-blocks-again-dropout": (
        *(2, 1, {"recompute": "block"}),
        *({"dropout": 0.1, "n_kv_heads": 1, "activation": "relu2"}, "adamw"),
    ),
    "tp2-attention-again": (
        *(2, 1, {"recompute": "attention", "sequence_parallel": True}),
        *({"n_kv_heads": 1, "rotary_pairs": "neighbours", "rotary_fraction": 0.67}, "adamw"),
    ),
}


def check_case(case: str) -> None:
    tp, dp, how, changes, optimizer = CASES[case]
    context = init_parallel(ParallelConfig(tp, dp, **how))
    proof = Proof(llama(**changes), context, OptimConfig(optimizer=optimizer))
    assert type(proof.model(ParallelContext(), torch.float64)) is Llama
    assert not_proven(proof) == []
    assert [column.wrong for column in prove(proof)] == [[]]


@pytest.mark.parametrize("case", CASES)
def test_a_layout_equals_the_oracle(case: str) -> None:
    """Logits, loss, every gradient, the norm, a clipped step of SGD, and updates, in float64."""
    run_ranks(CASES[case][0] * CASES[case][1], check_case, case)


CHOICES: list[dict[str, Any]] = [
    *({"activation": name} for name in (*GATES, *ACTIVATIONS)),
    *({"norm": name} for name in ("rmsnorm", "layernorm", "none")),
    {"norm_eps": 0.1},
    {"rotary_pairs": "neighbours"},
    {"rotary_fraction": 0.34, "rotary_base": 7.0},
    {"qk_norm": True, "norm_eps": 0.3},
    {"n_heads": 1, "n_kv_heads": 1},
    {"n_kv_heads": 8, "tied": True, "qkv_bias": True},
]


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_a_choice_equals_the_oracle_and_is_one(changes: dict[str, Any]) -> None:
    proof = Proof(llama(**changes), ParallelContext(), OptimConfig())
    assert [column.wrong for column in prove(proof)] == [[]]
    plain = llama()
    if replace(plain, **changes).n_kv_heads != plain.n_kv_heads:
        return  # weights of other shapes
    same: tuple[Any, ...] = {"activation": "swiglu"}, {"norm": "rmsnorm"}
    logits = ("logits", "logits")
    changed = proof.oracle[logits] - Proof(plain, ParallelContext(), OptimConfig()).oracle[logits]
    assert (changed.abs().max() > 1e-6) == (changes not in same)


def test_every_choice_is_among_the_cases() -> None:
    hints = get_type_hints(GPTConfig)
    for name in ("activation", "norm", "rotary_pairs"):
        literal = next((one for one in get_args(hints[name]) if get_args(one)), hints[name])
        tried = {str(changes.get(name)) for changes in CHOICES} - {"None"}
        assert set(get_args(literal)) - {"halves"} == tried


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_nothing(side: str) -> None:
    config = llama(qk_norm=True)
    assert_padding_moves_nothing(config, build_reference(config).double(), side)


def shared_head() -> tuple[float, list[float], int]:
    """The norm, this rank's key-value gradient, and its size, where all hold the only head."""
    context = init_parallel(ParallelConfig())
    model = build_model(llama(n_kv_heads=1, n_layers=1), context).double()
    init_weights(model, seed=1)
    input_ids, labels = random_batch(llama(), 2)
    accumulate_gradients(model, [(0, input_ids, labels)], context)
    weight = model.get_parameter("blocks.0.attention.key_value.weight")
    assert weight.grad is not None
    own = weight.grad.clone()
    reduce_gradients(model, context)
    assert context.tp.size == 1 or not torch.equal(own, weight.grad), "a part of the sum before"
    norm = clip_gradients(model, context, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)
    check_replicas(model, context, 1)
    whole = gather_whole(model)["blocks.0.attention.key_value.weight"]
    assert tuple(whole.shape) == shard_spec(weight).dense_shape == (12, 24)
    return norm, weight.grad.flatten().tolist(), weight.numel()


def test_a_head_that_all_ranks_hold_counts_once() -> None:
    (alone,) = run_ranks(1, shared_head)
    for norm, gradient, size in run_ranks(4, shared_head):
        assert norm == pytest.approx(alone[0], rel=1e-12)
        assert gradient == pytest.approx(alone[1], rel=1e-9, abs=1e-14)
        assert size == alone[2]


def angles(positions: Tensor, **changes: Any) -> Tensor:
    return turning(positions, llama(**changes), torch.float64)


def test_pairs_turn_as_they_are_named() -> None:
    """At position 1 the slowest pair of two turns by 1/sqrt(base), the other by 1, none beyond."""
    x = torch.zeros(6, 2, 1, 6, dtype=torch.float64)
    x[torch.arange(6), :, 0, torch.arange(6)] = 1  # one row for each feature
    for pairs, partners in {"halves": (2, 3, 0, 1), "neighbours": (1, 0, 3, 2)}.items():
        config = {"rotary_fraction": 0.67, "rotary_pairs": pairs}
        turned = turn(x, angles(torch.arange(2), **config), pairs)
        assert_equal("at position 0", turned[:, 0], x[:, 0])
        for feature, partner in enumerate(partners):
            expected = {feature, partner}
            assert set(turned[feature, 1, 0].nonzero().flatten().tolist()) == expected
        assert torch.equal(turned[4:], x[4:])


def test_the_norm_is_the_library_s() -> None:
    x = torch.randn(3, 5, dtype=torch.float64) * 7 + 2
    ours = RMSNorm(5, False, ParallelContext().tp).double()
    theirs = torch.nn.RMSNorm(5, eps=1e-5).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(5))
        ours.weight.copy_(theirs.weight)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "changes, tp, message",
    [
        ({"n_kv_heads": 3}, 1, "n_heads=8 is not divisible by n_kv_heads=3; n_kv_heads can be 1, "),
        ({"d_head": 5}, 1, "turns pairs, and 5 of a head's 5 features (rotary_fraction=1) are"),
        ({"rotary_fraction": 0.5}, 1, "3 of a head's 6 features (rotary_fraction=0.5) are none"),
        ({"bias": True, "qkv_bias": True}, 1, "qkv_bias is for models without the other biases"),
        ({"norm": "none", "norm_eps": 0.1}, 1, "norm_eps is rmsnorm's, and norm=none; leave it"),
        ({"architecture": "gpt2"}, 1, "n_kv_heads=2 is a choice of architecture=llama, and this"),
        ({"norm": "batch"}, 1, "norm='batch' must be rmsnorm, layernorm or none"),
        (
            *({"n_heads": 12, "n_kv_heads": 6, "d_ff": 48}, 4),
            "n_kv_heads=6 and tp_size=4: one must divide the other; tp_size can be 1, 2, 3, 6 or",
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        llama(**changes).check(tp)
    assert message in str(error.value)
