"""The model in every layout against the dense oracle: logits, loss and each gradient, all ranks."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_all_equal, assert_equal, dense_model, gradients, random_batch, tiny_config
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import Axis, ParallelContext, init_parallel, init_tensor_parallel
from rosetrainer.parallel.sharding import draw_whole, gather_whole, init_weights, load_whole
from rosetrainer.validation import ConfigError

LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 2)]  # (dp, tp)
VARIANTS: dict[str, dict[str, object]] = {
    "tied": {},
    "untied": {"tied": False},
    "no_bias": {"bias": False, "d_head": None},
}


def padding_mask(kind: str, rows: int, tokens: int) -> Tensor | None:
    """(rows, tokens): row r has r tokens of padding on the named side, or one after each end."""
    if kind == "none":
        return None
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        if kind in ("left", "both"):
            mask[row, : row + (kind == "both")] = 0
        if kind in ("right", "both"):
            mask[row, tokens - row - (kind == "both") :] = 0
    return mask


def check_model(config: GPTConfig, dp_size: int, padding: str) -> None:
    context = init_parallel(ParallelConfig(dp_size=dp_size))
    dense = dense_model(config)
    input_ids, labels = random_batch(config, rows=3, seed=context.dp.rank)
    mask = padding_mask(padding, *input_ids.shape)
    dense_logits, dense_loss = dense(input_ids, mask, labels)
    dense_loss.backward()

    model = GPTModel(config, context).double()
    load_whole(model, dense.state_dict())
    logits, loss = model(input_ids, mask, labels)
    assert logits is not None and loss is not None
    real = slice(None) if mask is None else mask.bool()
    assert logits.isfinite().all()
    assert_equal("logits", logits[real], dense_logits[real])
    assert_equal("loss", loss, dense_loss)
    loss.backward()
    assert_all_equal(gather_whole(model, gradients=True), gradients(dense))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dp_size, tp_size", LAYOUTS)
def test_logits_loss_and_gradients_equal_dense(dp_size: int, tp_size: int, variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    run_ranks(dp_size * tp_size, check_model, config, dp_size, "none")


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_padding_moves_nothing(tp_size: int, padding: str) -> None:
    run_ranks(tp_size, check_model, tiny_config(), 1, padding)


def gathered_initial_weights(config: GPTConfig) -> dict[str, list[float]]:
    context = init_tensor_parallel()
    model = GPTModel(config, context)
    init_weights(model, seed=7)
    return {name: w.flatten().tolist() for name, w in gather_whole(model).items()}


@pytest.mark.parametrize("tp_size", [2, 4])
def test_initial_weights_are_bitwise_those_of_one_process(tp_size: int) -> None:
    config = tiny_config(tied=False)
    model = GPTModel(config)
    init_weights(model, seed=7)
    whole = gather_whole(model)
    alone = {name: tensor.flatten().tolist() for name, tensor in whole.items()}
    for gathered in run_ranks(tp_size, gathered_initial_weights, config):
        assert gathered.keys() == alone.keys()
        assert [name for name in alone if gathered[name] != alone[name]] == []


def test_initial_weights_have_the_whole_fan_in_s_scale() -> None:
    config = GPTConfig(n_layers=2, d_model=64, d_ff=256)
    model = GPTModel(config)
    init_weights(model, seed=1)
    std = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    block = "blocks.1.feed_forward"
    assert std[f"{block}.dense_h_to_4h.weight"] == pytest.approx(64**-0.5, rel=0.05)
    assert std[f"{block}.dense_4h_to_h.weight"] == pytest.approx((256 * 2 * 2) ** -0.5, rel=0.05)
    assert std["token_embedding.weight"] == pytest.approx(0.02, rel=0.05)
    assert std[f"{block}.dense_h_to_4h.bias"] == 0
    assert dict(model.named_parameters())["final_norm.weight"].eq(1).all()


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    from rosetrainer.parallel.sharding import Cut, ShardSpec

    spec = ShardSpec((4, 6), init_std=1.0)
    again = ShardSpec((4, 6), (Cut(Axis("tp", 2, 1), 1),), init_std=1.0)
    assert torch.equal(draw_whole(spec, 1, "a"), draw_whole(again, 1, "a"))
    assert not torch.equal(draw_whole(spec, 1, "a"), draw_whole(spec, 1, "b"))
    assert not torch.equal(draw_whole(spec, 1, "a"), draw_whole(spec, 2, "a"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    draw_whole(spec, 1, "a")
    assert torch.equal(torch.get_rng_state(), state)


def count_collectives(config: GPTConfig) -> dict[tuple[str, str], tuple[int, int]]:
    context = init_tensor_parallel()
    model = GPTModel(config, context).double()
    init_weights(model, seed=1)
    input_ids, labels = random_batch(config, rows=3)
    _, loss = model(input_ids, labels=labels, return_logits=False)
    loss.backward()
    return {k: (t.calls, t.payload_bytes) for k, t in context.tp.ledger.entries.items()}


@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_block_has_two_all_reduces_each_way_and_nothing_else(tp_size: int) -> None:
    config = tiny_config(n_layers=3)
    tokens = 3 * 10 * 8  # B x T in float64
    one = tokens * config.d_model
    for counted in run_ranks(tp_size, count_collectives, config):
        # One more each way for embedding and head, and three numbers a token for the loss.
        assert counted == {
            ("all_reduce", "forward"): (7 + 2, 7 * one + 3 * tokens),
            ("all_reduce", "backward"): (7, 7 * one),
        }


def test_one_process_needs_no_process_group_and_counts_nothing() -> None:
    context = ParallelContext()
    model = GPTModel(tiny_config(), context)
    init_weights(model, seed=1)
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert not torch.distributed.is_initialized()
    assert not context.tp.ledger.entries


def test_a_future_token_moves_nothing_before_it() -> None:
    model = GPTModel(tiny_config()).double()
    load_whole(model, dense_model(tiny_config()).state_dict())
    input_ids, _ = random_batch(tiny_config(), rows=1)
    before, _ = model(input_ids)
    for t in range(input_ids.shape[1]):
        changed = input_ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 29
        after, _ = model(changed)
        moved = (after != before).any(-1)[0]
        assert not moved[:t].any() and moved[t]


def test_logits_are_left_out_only_when_asked() -> None:
    model = GPTModel(tiny_config())
    init_weights(model, seed=1)
    input_ids, labels = random_batch(tiny_config(), rows=2)
    logits, loss = model(input_ids, labels=labels, return_logits=False)
    assert logits is None
    assert torch.equal(loss, model(input_ids, labels=labels)[1])
    assert model(input_ids)[1] is None


def test_labels_that_are_all_ignored_give_zero_loss_and_zero_gradients() -> None:
    model = GPTModel(tiny_config())
    init_weights(model, seed=1)
    input_ids, labels = random_batch(tiny_config(), rows=2, ignored=1.0)
    _, loss = model(input_ids, labels=labels)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


def test_a_sequence_that_is_too_long_is_refused() -> None:
    model = GPTModel(tiny_config())
    with pytest.raises(ValueError, match="13 tokens exceed context_length=12"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    assert model(torch.zeros(1, 12, dtype=torch.int64))[0].shape == (1, 12, 29)


def test_heads_and_features_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_heads=8 .* tp_size=3; tp_size can be 1, 2, 4 or 8"):
        tiny_config().check(tp_size=3)
    with pytest.raises(ConfigError, match="d_ff=36 .* tp_size=8; tp_size can be 1, 2 or 4"):
        tiny_config(d_ff=36).check(tp_size=8)
    with pytest.raises(ConfigError, match="dropout=1.0"):
        tiny_config(dropout=1.0).check()
    with pytest.raises(ConfigError, match="context_length=12 .* tp_size=8, .* a multiple of 8"):
        tiny_config().check(tp_size=8, sequence_parallel=True)
