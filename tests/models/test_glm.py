"""The original GLM in layouts against its oracle, and what its two parts see of each other."""

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
from rosetrainer.models.glm import Filling, Glm, text_alone
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.proof.batches import inputs_of
from rosetrainer.proof.tolerances import not_proven, prove
from rosetrainer.proof.trajectory import Proof

# tp, dp, what the layout adds, what the model adds, the optimizer.
LAYOUTS: list[tuple[int, int, dict[str, Any], dict[str, Any], Any]] = [
    (4, 1, {"sequence_parallel": True, "recompute": "block"}, {"dropout": 0.1}, "adamw"),
    (
        *(2, 2, {"recompute": "attention"}),
        {"activation": "relu2", "bias": False, "tied": False},
        "muon",
    ),
]


def glm(**changes: Any) -> GPTConfig:
    return tiny_config(**{"context_length": 16, "architecture": "glm", "tied": True, **changes})


def check_layouts() -> None:
    for tp, dp, how, changes, optimizer in LAYOUTS:
        context = init_parallel(ParallelConfig(tp, dp, **how))
        proof = Proof(glm(**changes), context, OptimConfig(optimizer=optimizer))
        assert type(proof.model(ParallelContext(), torch.float64)) is Glm
        assert not_proven(proof) == []
        assert [column.wrong for column in prove(proof)] == [[]]


def test_layouts_equal_the_oracle() -> None:
    """Logits, loss, every gradient, the norm, a clipped step of SGD, and updates, in float64."""
    run_ranks(4, check_layouts)


def model_and_inputs() -> tuple[Glm, Tensor, Tensor, Tensor]:
    """A has 4 tokens, and two spans of 3 and 2 follow it."""
    model = build_model(glm()).double()
    init_weights(model, seed=3)
    assert isinstance(model, Glm)
    ids = torch.randint(29, (1, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 2, 2, 2, 0, 0]])
    return model, ids, positions, torch.tensor([[0, 0, 0, 0, 1, 2, 3, 1, 2]])


def test_all_of_part_a_is_seen_by_all_and_part_b_by_what_follows() -> None:
    model, *inputs = model_and_inputs()
    ids, *positions = inputs
    before = model(*inputs)[0]
    for place in range(9):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % 29
        changed = ((model(other, *positions)[0] - before).abs().amax(-1) > 1e-9)[0].tolist()
        assert changed == ([True] * 9 if place < 4 else [False] * place + [True] * (9 - place))


def test_each_of_both_positions_counts() -> None:
    model, ids, positions, span_positions = model_and_inputs()
    before = model(ids, positions, span_positions)[0]
    other = positions.clone()
    other[0, 4:7] = 1  # the span's mask stands elsewhere
    assert ((model(ids, other, span_positions)[0] - before).abs().amax(-1)[0, 4:] > 1e-9).all()
    other = span_positions.clone()
    other[0, 8] = 5
    changed = (model(ids, positions, other)[0] - before).abs().amax(-1)[0]
    assert (changed[:8] == 0).all() and changed[8] > 1e-9


def test_padding_anywhere_moves_nothing() -> None:
    """On the left, between text and spans, and on the right."""
    model, *inputs = model_and_inputs()
    labels = torch.tensor([[-100] * 4 + [3, 1, 4, 1, 5]])
    logits, loss = model(*inputs, labels)
    kept = torch.tensor([2, 3, 4, 5, 7, 8, 9, 10, 11])
    mask, padded = torch.zeros(1, 14, dtype=torch.int64), []
    mask[0, kept] = 1
    for tensor in (*inputs, labels):
        wide = torch.full((1, 14), 7)
        wide[0, kept] = tensor[0]
        padded.append(wide)
    padded[2][0, [0, 1, 6]] = 0  # of part A, as what stands beside it
    found, same = model(*padded, attention_mask=mask)
    torch.testing.assert_close(found[:, kept], logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(same, loss, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        model(*(torch.zeros(1, 17, dtype=torch.int64),) * 3)


def test_a_span_is_gone_on_with_where_its_mask_stands() -> None:
    model, ids, *_ = model_and_inputs()
    found = Filling(model, text_alone(ids[0, :4]), 2)(ids[:, 4:7])[0]
    positions = torch.tensor([[0, 1, 2, 3, 2, 2, 2]]), torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    assert found is not None
    assert torch.equal(found, model(ids[:, :7], *positions)[0])


def test_the_size_is_counted_and_the_proof_s_batches_have_both_parts() -> None:
    model = build_model(glm())
    assert sum(p.numel() for p in model.parameters()) - 99 * 24 == parameter_count(model.config)
    _, positions, span_positions = inputs_of(
        glm(), torch.zeros(4, 16, dtype=torch.int64), torch.Generator()
    )
    assert sorted((span_positions == 0).sum(1).tolist()) == [5, 5, 6, 7]
    assert positions.max() < 16 and span_positions.max() == 3


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"activation": "swiglu"},
            "activation=swiglu has a gate, and architecture=glm has none; it can be silu, gelu, "
            "gelu_tanh, relu or relu2",
        ),
        (
            {"rotary_fraction": 0.5},
            "rotary_fraction=0.5 is a choice of architecture=llama, and this is glm; add "
            "--architecture llama, or leave it out",
        ),
    ],
)
def test_choices_that_mean_nothing_together_are_one_line(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        glm(**changes).check()
    assert str(caught.value) == text
    with pytest.raises(ConfigError, match="architecture=glm runs in no pipeline, and pp_size=2"):
        ParallelConfig(pp_size=2).check_pipeline(glm(), 4)
