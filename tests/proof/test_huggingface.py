"""Against an implementation that is not ours: Hugging Face's GPT-2 with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpt2_names import rename
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_all_equal, assert_equal, gradients, random_batch
from ranks import run_ranks
from torch import Tensor

from rosetrainer.config import GPTConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import init_tensor_parallel
from rosetrainer.parallel.sharding import gather_whole, load_whole

# Theirs -> ours. Their Conv1D keeps its weight as (in, out), so it is transposed.


def batch(config: GPTConfig, padding: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, mask, labels), each (3, T)"""
    input_ids, labels = random_batch(config, rows=3, seed=seed)
    mask = torch.ones_like(input_ids)
    mask[1, :padding] = 0
    labels[mask == 0] = -100
    labels[:, -1] = -100  # they shift inside: their label t + 1 is ours of t, our last falls off
    return input_ids, mask, labels


def by_gpt2(config: GPTConfig, padding: int, seed: int) -> dict[str, Any]:
    """What theirs computes, and its weights and gradients by our names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.ff_width,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=config.tied,
        )
    ).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    input_ids, mask, labels = batch(config, padding, seed)
    their_labels = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = theirs(input_ids, attention_mask=mask, position_ids=positions, labels=their_labels)
    # Their loss is computed in fp32 whatever the model's dtype; the exact one is of their logits.
    exact_loss = F.cross_entropy(found.logits.flatten(0, 1), labels.flatten())
    exact_loss.backward()
    return {
        "weights": rename({name: p.detach() for name, p in theirs.named_parameters()}),
        "logits": found.logits.detach(),
        "loss": exact_loss.detach(),
        "their loss": found.loss.item(),
        "gradients": rename(gradients(theirs)),
    }


def check(config: GPTConfig, padding: int, seed: int, expected: dict[str, Any]) -> None:
    context = init_tensor_parallel()
    model = GPTModel(config, context).double()
    load_whole(model, expected["weights"])
    input_ids, mask, labels = batch(config, padding, seed)
    logits, loss = model(input_ids, mask, labels)
    loss.backward()
    assert_equal("logits", logits[mask == 1], expected["logits"][mask == 1])
    assert_equal("loss", loss, expected["loss"])
    assert loss.item() == pytest.approx(expected["their loss"], rel=1e-6)
    assert_all_equal(gather_whole(model, gradients=True), expected["gradients"])


def check_with_file(config: GPTConfig, padding: int, seed: int, path: Path) -> None:
    """On a rank, for which the import of theirs would cost more than all else."""
    check(config, padding, seed, torch.load(path, weights_only=True))


configs = st.builds(
    lambda vocab, context, layers, heads, width, inner, tied: GPTConfig(
        vocab, context, layers, 2 * heads, 2 * heads * width, None, 2 * inner, tied=tied
    ),
    *(st.integers(*r) for r in ((5, 40), (4, 16), (1, 3), (1, 3), (1, 6), (3, 20))),
    st.booleans(),
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(config=configs, padding=st.integers(0, 1), seed=st.integers(0, 99))
def test_one_process_equals_hugging_face(config: GPTConfig, padding: int, seed: int) -> None:
    check(config, padding, seed, by_gpt2(config, padding, seed))


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_equal_hugging_face(tied: bool, tmp_path: Path) -> None:
    config = GPTConfig(31, 10, 2, 4, 16, d_ff=40, tied=tied)
    torch.save(by_gpt2(config, 3, 5), tmp_path / "theirs.pt")
    run_ranks(2, check_with_file, config, 3, 5, tmp_path / "theirs.pt")
