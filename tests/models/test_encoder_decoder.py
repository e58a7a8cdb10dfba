"""The encoder-decoder on 1, 2 and 4 ranks against torch's own transformer layers in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal, tiny_config
from ranks import run_ranks
from torch import Tensor, nn
from torch.func import functional_call

from rosetrainer.config import GPTConfig
from rosetrainer.models.encoder_decoder import EncoderDecoderModel
from rosetrainer.parallel.context import Axis, ParallelContext, init_tensor_parallel
from rosetrainer.parallel.sharding import (
    draw_whole,
    gather_whole,
    init_weights,
    load_whole,
    shard_spec,
)
from rosetrainer.validation import ConfigError

CONFIG = tiny_config(d_head=3)  # torch's heads have the width D/H
# Which of our layers hold the weights of torch's.
ENCODER = {
    "self_attn.in_proj": ["attention.query_key_value"],
    "self_attn.out_proj": ["attention.dense"],
    "linear1": ["feed_forward.dense_h_to_4h"],
    "linear2": ["feed_forward.dense_4h_to_h"],
    "norm1": ["attention_norm"],
    "norm2": ["feed_forward_norm"],
}
DECODER = {
    **ENCODER,
    "multihead_attn.in_proj": ["cross_attention.query", "cross_attention.key_value"],
    "multihead_attn.out_proj": ["cross_attention.dense"],
    "norm2": ["cross_attention_norm"],
    "norm3": ["feed_forward_norm"],
}


def torch_logits(w: dict[str, Tensor], config: GPTConfig, source: Tensor, target: Tensor) -> Tensor:
    """(T, V) of one source (S,) and target (T,) without padding, by layers that are not ours."""

    def layer(
        kind: type[nn.Module], prefix: str, names: dict[str, list[str]], *x: Tensor, **mask: Tensor
    ) -> Tensor:
        sizes = (config.d_model, config.n_heads, config.ff_width, 0.0)
        built = kind(*sizes, lambda x: F.gelu(x, approximate="tanh"), norm_first=True)
        held = {}
        for name, _ in built.named_parameters():
            theirs, last = name.replace("in_proj_", "in_proj.").rsplit(".", 1)
            held[name] = torch.cat([w[f"{prefix}.{ours}.{last}"] for ours in names[theirs]])
        return functional_call(built, held, x, mask)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["token_embedding.weight"][source] + w["source_positions.weight"][: len(source)]
    y = w["token_embedding.weight"][target] + w["target_positions.weight"][: len(target)]
    future = torch.ones(len(target), len(target)).triu(1).bool()
    for i in range(config.n_layers):
        x = layer(nn.TransformerEncoderLayer, f"encoder.{i}", ENCODER, x)
    memory = norm("encoder_norm", x)
    for i in range(config.n_layers):
        y = layer(nn.TransformerDecoderLayer, f"decoder.{i}", DECODER, y, memory, tgt_mask=future)
    head = "token_embedding.weight" if config.tied else "output_head.weight"
    return norm("final_norm", y) @ w[head].T


def batch(config: GPTConfig) -> tuple[Tensor, ...]:
    """(source, target, source mask, target mask, labels): padding at both ends of both sides."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(config.vocab_size, (3, 22), generator=generator)
    source, target, labels = ids.split([6, 8, 8], dim=1)
    source_mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    source_mask[0, :2] = source_mask[1, 4:] = target_mask[1, :1] = target_mask[2, 5:] = 0
    labels[0, 3] = -100
    return source, target, source_mask, target_mask, labels


def random_weights(model: EncoderDecoderModel) -> dict[str, Tensor]:
    noisy = {n: replace(shard_spec(p), init_std=0.3) for n, p in model.named_parameters()}
    return {n: draw_whole(spec, 7, n).double().requires_grad_() for n, spec in noisy.items()}


def dense_loss(w: dict[str, Tensor], config: GPTConfig) -> tuple[Tensor, Tensor]:
    """(logits of all target tokens in order, mean loss)"""
    source, target, source_mask, target_mask, labels = batch(config)
    rows = zip(source, source_mask.bool(), target, target_mask.bool(), strict=True)
    logits = torch.cat([torch_logits(w, config, s[m], t[n]) for s, m, t, n in rows])
    return logits, F.cross_entropy(logits, labels[target_mask.bool()])


def compare_all(ours: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """Every tensor; a key bias, whose true gradient is zero, against its layer's weight."""
    assert ours.keys() == dense.keys()
    for name, whole in dense.items():
        if not name.endswith("key_value.bias"):
            assert_equal(name, ours[name], whole)
            continue
        parts = 3 if name.endswith("query_key_value.bias") else 2
        largest = dense[name.replace("bias", "weight")].abs().max().item()
        pairs = zip(ours[name].chunk(parts), whole.chunk(parts), strict=True)
        for index, (a, b) in enumerate(pairs):
            is_key = index == parts - 2
            assert_equal(f"part {index} of {name}", a, b, largest if is_key else None)


def check_equals_torch(tied: bool) -> None:
    config = replace(CONFIG, tied=tied)
    context = init_tensor_parallel()
    model = EncoderDecoderModel(config, context).double()
    whole = random_weights(model)
    load_whole(model, whole)
    *inputs, labels = batch(config)
    mask = inputs[3].bool()
    for _ in range(3):
        dense_logits, expected = dense_loss(whole, config)
        expected.backward()
        context.tp.ledger.clear()
        _, loss = model(*inputs, labels, return_logits=False)
        assert loss is not None
        loss.backward()
        calls = {key: traffic.calls for key, traffic in context.tp.ledger.entries.items()}
        # Two all-reduces an encoder block, three a decoder block, and one more for the memory; two
        # embeddings and the loss's two, and the head.
        forward, backward = 5 * config.n_layers + 4, 6 * config.n_layers + 1
        counted = {("all_reduce", "forward"): forward, ("all_reduce", "backward"): backward}
        assert calls == (counted if context.tp.size > 1 else {})
        logits, _ = model(*inputs)
        assert_equal("logits", logits[mask], dense_logits)
        assert_equal("loss", loss, expected)
        gradients = {n: w.grad for n, w in whole.items() if w.grad is not None}
        compare_all(gather_whole(model, gradients=True), gradients)
        for parameter in (*model.parameters(), *whole.values()):
            assert parameter.grad is not None
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    compare_all(gather_whole(model), {n: w.detach() for n, w in whole.items()})


@pytest.mark.parametrize("tp_size, tied", [(1, True), (2, True), (4, False)])
def test_logits_gradients_and_three_updates_equal_torch_s_layers(tp_size: int, tied: bool) -> None:
    run_ranks(tp_size, check_equals_torch, tied)


def check_padding_moves_nothing() -> None:
    model = EncoderDecoderModel(CONFIG, init_tensor_parallel()).double()
    load_whole(model, {n: w.detach() for n, w in random_weights(model).items()})
    source, target, source_mask, target_mask, _ = batch(CONFIG)
    before, _ = model(source, target, source_mask, target_mask)
    other = [ids.where(mask > 0, 5) for ids, mask in ((source, source_mask), (target, target_mask))]
    after, _ = model(*other, source_mask, target_mask)
    assert before is not None
    assert after is not None
    assert torch.equal(before[target_mask.bool()], after[target_mask.bool()])


@pytest.mark.parametrize("tp_size", [1, 2])
def test_what_stands_in_padding_moves_nothing(tp_size: int) -> None:
    run_ranks(tp_size, check_padding_moves_nothing)


def initial_weights() -> list[list[float]]:
    context = init_tensor_parallel()
    model = EncoderDecoderModel(CONFIG, context)
    init_weights(model, seed=5)
    return [w.flatten().tolist() for w in gather_whole(model).values()]


def test_initial_weights_are_bitwise_those_of_one_process() -> None:
    alone = initial_weights()
    assert run_ranks(4, initial_weights) == [alone] * 4


def test_a_source_without_a_token_and_a_long_side_are_refused() -> None:
    model = EncoderDecoderModel(CONFIG)
    init_weights(model, seed=0)
    source, target, source_mask, target_mask, _ = batch(CONFIG)
    source_mask[2] = 0
    with pytest.raises(ValueError, match="a source holds no token"):
        model(source, target, source_mask, target_mask)
    long = torch.zeros(1, CONFIG.context_length + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="13 tokens exceed context_length=12"):
        model(long, long, torch.ones_like(long), torch.ones_like(long))


def test_ranks_that_cannot_share_the_heads_are_refused() -> None:
    context = ParallelContext(tp=Axis("tp", size=3))
    with pytest.raises(ConfigError, match="n_heads=8 is not divisible by tp_size=3"):
        EncoderDecoderModel(CONFIG, context)
