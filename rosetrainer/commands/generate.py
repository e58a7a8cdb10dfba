"""Text out of a trained model, at any tensor-parallel size.

python -m rosetrainer generate --prompt "The " --tokens 200
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from rosetrainer.checkpoint.run_folder import latest_run, read_run, run_of
from rosetrainer.checkpoint.saver import load_parameters
from rosetrainer.commands.flags import parse_flags, ranks_to_start
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.data.tokenizer import Tokenizer
from rosetrainer.environment import choose_device, world_from_environment
from rosetrainer.hardware.performance import set_threads
from rosetrainer.launch.launcher import launch
from rosetrainer.model_size import check_memory
from rosetrainer.models.gpt import GPTModel
from rosetrainer.models.layers import build_model
from rosetrainer.parallel.comm import broadcast_
from rosetrainer.parallel.context import Axis, ParallelContext, end_parallel, init_parallel
from rosetrainer.training.agreement import world_axis
from rosetrainer.training.resume import sound_one
from rosetrainer.validation import (
    Bounds,
    ConfigError,
    CountOrZero,
    Fraction,
    LocalRanks,
    PositiveOrZero,
    check_fields,
)


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


@dataclass(frozen=True)
class GenerateCommand:
    """Writes text with a trained model."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    run: Path | None = None
    """A run folder, whose newest sound checkpoint is taken, or one checkpoint in it; unless given,
    the run in out/ that saved last."""
    prompt: str | None = None
    """The text that is continued; unless given, a new document, or after a line break, begins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when each local rank has a GPU of its own."""
    nproc: LocalRanks | None = None
    """Start this many tensor-parallel ranks on this machine; leave it out under torchrun."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    command = parse_flags(GenerateCommand, argv, "python -m rosetrainer generate")
    check_fields(command)
    world_size, starts = ranks_to_start("generate", argv, command.nproc, ParallelConfig())
    path = command.run or latest_run()
    config, tokenizer = read_run(run_of(path))
    config.model.check(world_size)
    prompt = first_tokens(command.prompt, tokenizer)
    if starts:
        return launch(world_size, ["generate", *argv])
    if choose_device(command.device).type == "cpu":
        here = world_from_environment()[3]
        check_memory(config.model, 4, "weights", here / world_size)
    set_threads(0)
    context = init_parallel(ParallelConfig(tp_size=world_size), command.device)
    model = load_model(path, config.model, context)
    decoder = tokenizer.stream_decoder()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character

    def write(text: str) -> None:
        if context.rank == 0:
            print(text, end="", flush=True)

    write(command.prompt or "")
    ids = torch.tensor(prompt, device=context.device)
    for token in generate(model, ids, command.sampling, context.tp, tokenizer.end_of_text):
        write(decoder.feed(token))
    write(decoder.finish() + "\n")
    end_parallel()
    return 0


def load_model(path: Path, config: GPTConfig, context: ParallelContext) -> GPTModel:
    """The model of a run or checkpoint, of which each rank reads and holds its own slices alone.

    Raises ConfigError if there is no sound checkpoint, or it is of another model.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the text
        folder, manifest = sound_one(path, world_axis(), context.device)
    model = build_model(config, context)
    if manifest.progress.dtype == "float64":
        model.double()
    load_parameters(folder, manifest, model)
    return model


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
    model: GPTModel,
    prompt: Tensor,
    sampling: SamplingConfig,
    tp: Axis,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yields token ids that continue prompt, (T,); the model sees the last context_length.

    Stops, without yielding it, at end_of_text.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = prompt
    for _ in range(sampling.tokens):
        logits, _ = model(ids[None, -model.config.context_length :])
        assert logits is not None
        token = choose(logits[0, -1].float().cpu(), sampling, generator).to(ids.device)
        # The first rank decides: rounding must never let the ranks write different texts.
        token = broadcast_(token, tp, "forward")
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
