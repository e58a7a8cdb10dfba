"""Text out of a trained model: one token after the other, drawn from its probabilities.

Letters: T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rosetrainer.data.tokenizer import Tokenizer
from rosetrainer.models.glm import Filling
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.t5 import Answer
from rosetrainer.parallel.comm import all_reduce, broadcast_
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.pipeline.runner import last_logits
from rosetrainer.validation import Bounds, ConfigError, CountOrZero, Fraction, PositiveOrZero


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    tokens: CountOrZero = 200
    """Tokens to write, fewer where the document ends before."""
    temperature: PositiveOrZero = 0.8
    """Below 1 the likely tokens gain; 0 always takes the likeliest."""
    top_k: CountOrZero = 0
    """Draw from the k likeliest tokens only; 0 draws from all."""
    top_p: Fraction = 1.0
    """Draw from the likeliest tokens that together reach this probability."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 1
    """The same seed writes the same text, at any tensor-parallel size up to rounding."""


def first_tokens(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    """The ids to go on from, at least one. Raises ConfigError for a prompt that has none."""
    if prompt is None and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]  # behind it documents begin
    try:
        ids = tokenizer.encode("\n" if prompt is None else prompt).tolist()
    except ConfigError:
        if prompt is not None:
            raise
        return [0]  # a corpus of one line, or of no text at all
    if not ids and prompt is not None:
        raise ConfigError("prompt='' has no token to go on from; give at least one character")
    return [int(token) for token in ids] or [0]


@torch.no_grad()
def generate(
    model: GPTModel | Answer | Filling,
    prompt: Tensor,
    sampling: SamplingConfig,
    context: ParallelContext,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yields token ids that continue prompt, (T,); the model sees the last context_length.

    Stops, without yielding it, at end_of_text.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = prompt
    for _ in range(sampling.tokens):
        seen = ids[None, -model.config.context_length :]
        logits = last_logits(model, seen, context=context)
        token = torch.zeros_like(ids[:1])
        if logits is not None:
            token = choose(logits[0, -1].float().cpu(), sampling, generator).to(ids.device)
        # The first rank decides: rounding must never let the ranks write different texts.
        token = broadcast_(token, context.tp, "forward")
        token = all_reduce(token, context.pp, "forward")  # the last stage's, all others have 0
        if int(token) == end_of_text:
            return
        ids = torch.cat([ids, token])
        yield int(token)


def choose(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """A token id, (1,), drawn from logits (V,) after temperature, top-k and top-p.

    Top-p is nucleus sampling: "The Curious Case of Neural Text Degeneration" (Holtzman et al.).
    """
    if not logits.isfinite().all():
        raise ConfigError("the model's logits hold nan or inf: its weights are damaged; use others")
    # Below fp32's numbers, as at 0, all the probability is the likeliest token's.
    if sampling.temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(keepdim=True)
    # Beneath the maximum, so that a temperature near 0 cannot overflow.
    ordered, order = ((logits - logits.max()) / sampling.temperature).sort(descending=True)
    probabilities = ordered.softmax(-1)
    if 0 < sampling.top_k < len(probabilities):
        probabilities[sampling.top_k :] = 0
    before = probabilities.cumsum(-1) / probabilities.sum() - probabilities / probabilities.sum()
    # The token that crosses top_p stays, so there is always one.
    probabilities[1:][before[1:] >= sampling.top_p] = 0
    return order[torch.multinomial(probabilities, 1, generator=generator)]
