"""Steps as a user would write them: a plain GPT-2 under autocast, and Hugging Face's.

torch's AdamW as it comes, torch's clip, no dropout. On every side the GELU is GPT-2's tanh form.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baseline_recipe import PlainGPT, plain_optimizer
from benchmarks.work import Work
from rosetrainer.config import GPTConfig

RATE, CLIP = 1e-3, 1.0


def plain_model(config: GPTConfig) -> PlainGPT:
    """A model of the config's shapes, and of the initial weights that a plain GPT-2 has."""
    torch.manual_seed(1)
    return PlainGPT(
        config.vocab_size,
        config.context_length,
        config.n_layers,
        config.n_heads,
        config.d_model,
        config.bias,
        gelu="tanh",
    )


def autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    return partial(torch.autocast, "cpu", dtype) if dtype == torch.bfloat16 else nullcontext


class PlainStep:
    """PlainGPT, or another model with its forward pass: (ids, labels) -> loss."""

    def __init__(self, work: Work, dtype: torch.dtype, model: nn.Module | None = None) -> None:
        self.model = model or plain_model(work.model)
        if dtype == torch.float64:
            self.model.double()
        self.optimizer = plain_optimizer(self.model, RATE)
        self.batch, self.autocast = work.batch(), autocast(dtype)

    def __call__(self) -> tuple[float, float]:
        with self.autocast():
            loss = self.model(*self.batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()


class HuggingFaceGPT2(nn.Module):
    """transformers' GPT2LMHeadModel as PlainGPT's forward pass; its loss takes labels as ours."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils.logging import set_verbosity_error

        set_verbosity_error()  # else it remarks on a default of its own
        torch.manual_seed(1)
        self.theirs = GPT2LMHeadModel(
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
                use_cache=False,  # it would keep keys and values for generation
            )
        )
        assert self.theirs.config._attn_implementation == "sdpa"

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        # Given labels alone it would shift them: a last token less, and a copy.
        return self.theirs(ids, labels=labels, shift_labels=labels).loss
