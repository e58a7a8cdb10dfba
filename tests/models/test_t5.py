"""What T5 is beside its layers; logits and gradients are held against the library's elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import tiny_config
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import ConfigError, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.model_size import parameter_count
from rosetrainer.models.build import build_model
from rosetrainer.models.relative_bias import RelativeBias
from rosetrainer.models.t5 import T5
from rosetrainer.parallel.context import Axis, ParallelContext, init_parallel
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.proof.tolerances import not_proven, prove
from rosetrainer.proof.trajectory import Proof

# tp, dp, what the layout adds, what the model adds, the optimizer.
LAYOUTS: list[tuple[int, int, dict[str, Any], dict[str, Any], Any]] = [
    (4, 1, {"sequence_parallel": True, "recompute": "block"}, {"dropout": 0.1}, "adamw"),
    (
        *(2, 2, {"recompute": "attention"}),
        {"tied": False, "activation": "geglu_tanh", "norm_eps": 0.1, "relative_buckets": 8},
        "muon",
    ),
]


def t5(**changes: Any) -> GPTConfig:
    plain = {"context_length": 16, "architecture": "t5", "bias": False, "tied": True}
    return tiny_config(**{**plain, **changes})


def check_layouts() -> None:
    for tp, dp, how, changes, optimizer in LAYOUTS:
        context = init_parallel(ParallelConfig(tp, dp, **how))
        proof = Proof(t5(**changes), context, OptimConfig(optimizer=optimizer))
        assert type(proof.model(ParallelContext(), torch.float64)) is T5
        assert not_proven(proof) == []
        assert [column.wrong for column in prove(proof)] == [[]]


def test_layouts_equal_the_oracle() -> None:
    """Logits, loss, every gradient, the norm, a clipped step of SGD, and updates, in float64."""
    run_ranks(4, check_layouts)


def test_near_distances_have_a_bucket_each_and_far_ones_share() -> None:
    config = t5(relative_buckets=8, relative_distance=20)
    distances = torch.arange(-40, 41)
    behind = RelativeBias(config, True, Axis("tp")).bucket_of(distances).tolist()
    assert behind[40:] == [0] * 41
    by_distance = behind[40::-1]  # 0, 1, 2, ... tokens back
    assert by_distance[:5] == [0, 1, 2, 3, 4] and by_distance == sorted(by_distance)
    assert by_distance[20:] == [7] * 21 and set(by_distance) == set(range(8))
    both = RelativeBias(config, False, Axis("tp")).bucket_of(distances)
    back, ahead = both[:40].flip(0), both[41:]
    assert both[40] == 0 and (ahead == back + 4).all() and set(back.tolist()) == {1, 2, 3}


def model_and_inputs(**changes: Any) -> tuple[T5, Tensor, Tensor, Tensor]:
    model = build_model(t5(**changes)).double()
    init_weights(model, seed=3)
    assert isinstance(model, T5)
    ids = torch.randint(29, (2, 1, 8), generator=torch.Generator().manual_seed(1))
    return model, ids[0], torch.ones_like(ids[0]), ids[1]


def test_padding_on_either_side_moves_nothing() -> None:
    model, source, mask, target = model_and_inputs()
    expected = model(source, mask, target)[0]
    for left, right in ((3, 0), (0, 2), (2, 3)):
        wide = torch.nn.functional.pad(source, (left, right), value=5)
        wide_mask = torch.nn.functional.pad(mask, (left, right))
        wide_target = torch.nn.functional.pad(target, (left, right), value=7)
        found = model(wide, wide_mask, wide_target, target_mask=wide_mask)[0]
        own = found[:, left : left + 8]
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    later = target.clone()
    later[0, 5] = (target[0, 5] + 1) % 29
    changed = (model(source, mask, later)[0] - expected).abs().amax(-1)[0]
    assert (changed[:5] == 0).all() and (changed[5:] > 0).all()
    with pytest.raises(ValueError, match="a source holds no token"):
        model(source, mask * 0, target)
    with pytest.raises(ValueError, match="24 tokens exceed context_length=16"):
        model(source.repeat(1, 3), mask.repeat(1, 3), target)


def test_dropout_is_in_every_part_and_the_size_is_counted() -> None:
    for changes in ({}, {"tied": False, "activation": "geglu_tanh"}):
        model, *_ = model_and_inputs(dropout=0.1, **changes)
        sites = {m.site for m in model.modules() if type(m).__name__ == "Dropout"}
        assert len(sites) == 2 + 2 * 3 + 2 * 5  # a cross-attention has two
        assert sum(p.numel() for p in model.parameters()) - 99 * 24 * (
            2 - model.config.tied
        ) == parameter_count(model.config)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"bias": True}, "architecture=t5 has no biases; add --no-bias"),
        (
            {"relative_distance": 16},
            "relative_distance=16 is not above half of relative_buckets=32, the distances that "
            "have one each; it can be 17 or more",
        ),
        (
            {"relative_buckets": 10},
            "relative_buckets=10 is not divisible by 4, the halves ahead and behind by the halves "
            "near and far; it can be 8",
        ),
        (
            {"architecture": "gpt2", "relative_buckets": 8},
            "relative_buckets=8 is a choice of architecture=t5, and this is gpt2; add "
            "--architecture t5, or leave it out",
        ),
    ],
)
def test_choices_that_mean_nothing_together_are_one_line(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        t5(**changes).check()
    assert str(caught.value) == text
    with pytest.raises(ConfigError, match="architecture=t5 runs in no pipeline, and pp_size=2"):
        ParallelConfig(pp_size=2).check_pipeline(t5(), 4)
