"""Text with blanks, and what a model writes into them: a GLM into each, a T5 one after the other.

Shape letters: A tokens of a prompt, n of a span so far, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from rosetrainer.config import GPTConfig
from rosetrainer.data.tokenizer import Tokenizer
from rosetrainer.models.generation import SamplingConfig, generate
from rosetrainer.models.glm import Filling, Glm, text_alone
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.t5 import T5, Answer
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.validation import ConfigError

BLANKS = {"t5": r"<extra_id_(\d+)>", "glm": r"\[MASK\]()"}
"""How a prompt says that something is missing, by the architecture: as these models' authors do."""
SPANS = 100  # ids of T5's that stand for one


def prompt_with_blanks(prompt: str | None, tokenizer: Tokenizer, config: GPTConfig) -> list[int]:
    """The ids that the model reads. Raises ConfigError for what it cannot read, or not go on from.

    A GLM's prompt without a blank has one at its end.
    """
    is_glm = config.architecture == "glm"
    needed = ("start_token", "end_token", *["mask_token"] * is_glm)
    if missing := [name for name in needed if getattr(config, name) is None]:
        raise ConfigError(f"the run's config.json says no {missing[0]}, without which none writes")
    blank = config.mask_token if is_glm else config.sentinel_token
    last = config.mask_token if is_glm else config.end_token
    assert last is not None
    ids, end, has_blank = [], 0, False
    prompt = prompt or ""
    for found in re.finditer(BLANKS[config.architecture], prompt):
        ids += encoded(prompt[end : found.start()], tokenizer)
        token = -1 if blank is None else blank - int(found[1] or 0)
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"{found[0]} in the prompt is for a model with a token for it, and this one's "
                f"config.json says of none; leave it out"
            )
        ids.append(token)
        end, has_blank = found.end(), True
    ids += encoded(prompt[end:], tokenizer)
    return ids if is_glm and has_blank else [*ids, last]


def check_room(prompt: list[int], config: GPTConfig) -> None:
    """Raises ConfigError for a prompt that leaves a sequence no place."""
    if len(prompt) >= config.context_length:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, and context_length={config.context_length} has "
            f"no place for more; give a shorter one"
        )


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    return [int(token) for token in tokenizer.encode(text)] if text else []


def pieces_with_blanks(tokenizer: Tokenizer, config: GPTConfig) -> Tokenizer:
    """The tokenizer, which now knows the ids that the model has behind those of its corpus."""
    known = tokenizer.vocab_size
    tokenizer.pieces += [b""] * (config.vocab_size - known)
    if config.sentinel_token is not None:
        for number in range(min(SPANS, config.sentinel_token + 1)):
            if config.sentinel_token - number >= known:
                tokenizer.pieces[config.sentinel_token - number] = b"<extra_id_%d>" % number
    return tokenizer


def fill_in(
    model: GPTModel,
    prompt: list[int],
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    context: ParallelContext,
) -> Iterator[str]:
    """Yields text: a T5's answer, or a GLM's prompt with its blanks filled in, from first to last.

    Each span ends with the model's end token, or where there is no place for more. prompt: (A,),
    of prompt_with_blanks; tokenizer: of pieces_with_blanks.
    """
    config, ids = model.config, torch.tensor(prompt, device=context.device)
    start = torch.tensor([config.start_token], device=context.device)
    if isinstance(model, T5):
        limited = replace(sampling, tokens=min(sampling.tokens, config.context_length))
        answer = generate(Answer(model, ids), start, limited, context, config.end_token)
        yield from tokenizer.stream(answer)
        return
    assert isinstance(model, Glm)
    places = [place for place, token in enumerate(prompt) if token == config.mask_token]
    before = text_alone(ids)
    for place, begins in zip(places, [0, *(place + 1 for place in places)], strict=False):
        yield tokenizer.decode(prompt[begins:place])
        filling, span = Filling(model, before, place), start.tolist()
        left = max(config.context_length - len(before[0]), 0)  # the first one is for the start
        limited = replace(sampling, tokens=min(sampling.tokens, left))
        tokens = generate(filling, start, limited, context, config.end_token)
        yield from tokenizer.stream(noted(tokens, span))
        before = filling.followed_by(ids.new_tensor(span))
    yield tokenizer.decode(prompt[places[-1] + 1 :])


def noted(tokens: Iterator[int], into: list[int]) -> Iterator[int]:
    """The same tokens, each noted as it comes."""
    for token in tokens:
        into.append(token)
        yield token
