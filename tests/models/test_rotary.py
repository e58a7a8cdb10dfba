"""The rotary GPT in every layout against its oracle, and what rotation is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import (
    assert_all_equal,
    assert_equal,
    assert_padding_moves_nothing,
    gradients,
    random_batch,
    tiny_config,
)
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import ConfigError, GPTConfig, ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.layers import PlainNorm
from rosetrainer.models.positions import apply_rotary, rotary_angles
from rosetrainer.models.rotary import RotaryGPT
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.sharding import gather_whole, init_weights, load_whole
from rosetrainer.proof.oracles import build_reference
from rosetrainer.proof.reference import ReferenceDropout, ReferenceGPT
from rosetrainer.training.step import compute_gradients

ROWS, SEED = 4, DropoutSeed(3, step=2)


def rotary(**changes: Any) -> GPTConfig:
    shape = {"context_length": 16, "d_head": 6, "architecture": "rotary", "tied": False}
    return tiny_config(**{**shape, "rotary_base": 50.0, **changes})


def oracle(config: GPTConfig) -> ReferenceGPT:
    dense = build_reference(config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in dense.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn)
    return dense


CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "one-process": (1, 1, {}, {}),
    "tp2": (2, 1, {}, {}),
    "tp4-no-bias": (4, 1, {}, {"bias": False}),
    "dp2": (1, 2, {}, {}),
    "tp2-dp2-sequence-parallel": (2, 2, {"sequence_parallel": True}, {}),
    "tp4-sequence-parallel-dropout": (4, 1, {"sequence_parallel": True}, {"dropout": 0.1}),
    "tp2-blocks-again-dropout": (2, 1, {"recompute": "block"}, {"dropout": 0.1}),
    "tp2-attention-again": (2, 1, {"recompute": "attention"}, {}),
    "tp2-no-overlap": (2, 1, {"overlap": False}, {}),
}


def check_case(case: str) -> None:
    tp, dp, how, changes = CASES[case]
    config = rotary(**changes)
    context = init_parallel(ParallelConfig(tp, dp, **how))
    dense = oracle(config)
    input_ids, labels = (ids[:, :12] for ids in random_batch(config, ROWS))  # tp 4 divides 12
    masks = ReferenceDropout(config.dropout, SEED.seed, SEED.step)
    dense_logits, dense_loss = dense(input_ids, labels=labels, dropout=masks)
    dense_loss.backward()
    model = build_model(config, context).double()
    assert isinstance(model, RotaryGPT)
    load_whole(model, dense.state_dict())
    size = ROWS // dp
    rows = slice(context.dp.rank * size, (context.dp.rank + 1) * size)
    logits, _ = model(input_ids[rows], seed=replace(SEED, first_row=rows.start))
    assert_equal("logits", logits, dense_logits[rows])
    loss = compute_gradients(
        model, [(rows.start, input_ids[rows], labels[rows])], context, seed=SEED
    )
    assert_equal("loss", torch.full_like(dense_loss, loss), dense_loss)
    assert_all_equal(gather_whole(model, gradients=True), gradients(dense))


@pytest.mark.parametrize("case", CASES)
def test_the_rotary_gpt_equals_its_oracle(case: str) -> None:
    run_ranks(CASES[case][0] * CASES[case][1], check_case, case)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_nothing(side: str) -> None:
    config = rotary()
    assert_padding_moves_nothing(config, oracle(config), side)


def scores(positions: Tensor) -> Tensor:
    config = rotary()
    generator = torch.Generator().manual_seed(1)
    shape = (1, len(positions), 3, 8, 6)
    fused = torch.randn(1, 1, *shape[2:], dtype=torch.float64, generator=generator).expand(shape)
    turned = apply_rotary(fused, rotary_angles(positions, config, torch.float64))
    assert_equal("values", turned[:, :, 2], fused[:, :, 2])
    query, key, _ = turned.permute(2, 0, 3, 1, 4)
    return query @ key.mT


def test_scores_depend_on_the_distance_alone() -> None:
    here, elsewhere = scores(torch.arange(5)), scores(torch.arange(5) + 1000)
    torch.testing.assert_close(here, elsewhere, rtol=1e-9, atol=1e-9)
    assert (here[0, 0, 4] - here[0, 0, 4, 0]).abs()[1:].min() > 1e-3, "distances differ"


def test_a_rotary_gpt_begins_as_even_odds() -> None:
    config = rotary()
    model = build_model(config)
    init_weights(model, seed=1)
    input_ids, labels = random_batch(config, ROWS)
    _, loss = model(input_ids, labels=labels)
    assert loss.item() == pytest.approx(torch.tensor(config.vocab_size).log().item(), abs=1e-5)
    assert type(build_model(tiny_config())) is GPTModel


def test_the_norm_is_layer_norm_without_weights() -> None:
    x = torch.randn(3, 5, dtype=torch.float64) * 7 + 2
    torch.testing.assert_close(PlainNorm()(x), torch.nn.LayerNorm(5).double()(x))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tied": True}, "architecture=rotary has an output head of its own; add --no-tied"),
        ({"d_head": 5}, "turns pairs, and a head is 5 wide; d_head can be 6"),
        ({"rotary_base": 0.0}, "rotary_base=0.0 must be from 1e-30 to 1000000000"),
        (
            {"architecture": "mamba"},
            "'mamba' must be gpt2, rotary, llama, bert, t5, glm or transformer_xl",
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(rotary(**changes), ParallelContext())
    assert message in str(error.value)
