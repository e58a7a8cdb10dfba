"""Attention by distances, in layouts against its oracle and beside the library's XLNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal, assert_padding_moves_nothing, tiny_config
from ranks import run_ranks
from torch import nn
from transformers import XLNetConfig, XLNetModel

from rosetrainer.config import ConfigError, GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.transformer_xl import (
    RelativeAttention,
    TransformerXL,
    distance_table,
    key_for_distance,
)
from rosetrainer.parallel.context import Axis, ParallelContext, init_parallel
from rosetrainer.proof.oracles import build_reference
from rosetrainer.proof.tolerances import not_proven, prove
from rosetrainer.proof.trajectory import Proof

# tp, dp, what the layout adds, what the model adds, the optimizer.
LAYOUTS: list[tuple[int, int, dict[str, Any], dict[str, Any], Any]] = [
    (4, 1, {"sequence_parallel": True, "recompute": "block"}, {"dropout": 0.1}, "adamw"),
    (2, 2, {"recompute": "attention"}, {"bias": False, "tied": False, "d_head": 5}, "muon"),
    (2, 1, {"pp_size": 2, "pp_schedule": "zero-bubble", "sequence_parallel": True}, {}, "muon"),
]


def transformer_xl(**changes: Any) -> GPTConfig:
    return tiny_config(
        **{"context_length": 16, "architecture": "transformer_xl", "tied": True, **changes}
    )


def check_layouts() -> None:
    for tp, dp, how, changes, optimizer in LAYOUTS:
        context = init_parallel(ParallelConfig(tp, dp, **how))
        proof = Proof(transformer_xl(**changes), context, OptimConfig(optimizer=optimizer))
        assert type(proof.model(ParallelContext(), torch.float64)) is TransformerXL
        assert not_proven(proof) == []
        assert [column.wrong for column in prove(proof)] == [[]]


def test_layouts_equal_the_oracle() -> None:
    """Logits, loss, every gradient, the norm, a clipped step of SGD, and updates, in float64."""
    run_ranks(4, check_layouts)


def filled(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn)


def test_attention_is_that_of_xlnet() -> None:
    """The library's, which took it over from Transformer-XL, where a token sees those before it."""
    T, heads, K = 7, 3, 8
    config = transformer_xl(d_model=heads * K, n_heads=heads, d_head=K, bias=False)
    shape: dict[str, Any] = {
        "vocab_size": 8,
        "d_model": heads * K,
        "n_layer": 1,
        "n_head": heads,
        "d_inner": 12,
    }
    theirs: Any = XLNetModel(XLNetConfig(**shape, attn_type="uni", dropout=0.0)).double()
    ours = RelativeAttention(config, Axis("tp")).double()
    filled(ours)
    table = theirs.relative_positional_encoding(T, T, bsz=1)[:, 0]  # of the distances T to 0
    own_table = distance_table(T, config, ours.dense.weight)
    torch.testing.assert_close(table[1:].double(), own_table, rtol=0, atol=1e-6)
    x = torch.randn(2, T, heads * K, generator=torch.Generator().manual_seed(1)).double()
    query, key, value = ours.query_key_value(x).unflatten(-1, (3, heads, K)).unbind(2)
    distance = ours.distance(F.pad(own_table, (0, 0, 1, 0))).view(T + 1, 1, heads, K)
    layer = theirs.layer[0].rel_attn
    layer.r_w_bias = nn.Parameter(ours.content_bias.detach().view(heads, K))
    layer.r_r_bias = nn.Parameter(ours.distance_bias.detach().view(heads, K))
    attended = layer.rel_attn_core(
        *(part.transpose(0, 1) for part in (query, key, value)),
        distance.expand(-1, 2, -1, -1),
        attn_mask=torch.ones(T, T).double().triu(1)[:, :, None, None],
    )  # (T, B, heads, K)
    found = ours(x, own_table)
    assert found.abs().max() > 0.1
    assert_equal("attention", found, ours.dense(attended.transpose(0, 1).flatten(2)))


def test_a_query_s_row_moves_to_the_keys_at_their_distances() -> None:
    """Of 4 tokens, from the farthest, 3, to the nearest, 0."""
    scores = torch.tensor([[3.0, 2, 1, 0]]).expand(4, 4) + 10 * torch.arange(4.0)[:, None]
    found = key_for_distance(scores[None])[0].tril()
    assert found.tolist() == [[0, 0, 0, 0], [11, 10, 0, 0], [22, 21, 20, 0], [33, 32, 31, 30]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_nothing(side: str) -> None:
    config = transformer_xl()
    oracle = build_reference(config).double()
    filled(oracle)
    assert_padding_moves_nothing(config, oracle, side)


def test_what_a_text_begins_with_moves_nothing_that_is_far() -> None:
    """One layer, and a token that sees the same distances to the same tokens."""
    model = build_model(transformer_xl(n_layers=1)).double()
    filled(model)
    ids = torch.randint(29, (1, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(model(ids, mask)[0][:, 3:], model(ids[:, 3:])[0])


def test_a_width_that_sines_and_cosines_cannot_share_is_one_line() -> None:
    text = "architecture=transformer_xl has sines and cosines of distances, and d_model=15 is odd"
    with pytest.raises(ConfigError, match=f"{text}; it can be 16"):
        transformer_xl(d_model=15, n_heads=3).check()
