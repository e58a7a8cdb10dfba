"""Text out of a trained model, at any tensor-parallel size.

python -m rosetrainer generate --prompt "The " --tokens 200
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from rosetrainer.checkpoint.run_folder import latest_run, read_run, run_of
from rosetrainer.commands.flags import parse_flags, ranks_to_start
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.environment import choose_device, world_from_environment
from rosetrainer.hardware.performance import set_threads
from rosetrainer.launch.launcher import launch
from rosetrainer.model_size import check_memory
from rosetrainer.models.filling import (
    BLANKS,
    check_room,
    fill_in,
    pieces_with_blanks,
    prompt_with_blanks,
)
from rosetrainer.models.generation import SamplingConfig, first_tokens, generate
from rosetrainer.parallel.context import end_parallel, init_parallel
from rosetrainer.training.trained import load_model
from rosetrainer.validation import ConfigError, Count, LocalRanks


@dataclass(frozen=True)
class GenerateCommand:
    """Writes text with a trained model."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    run: Path | None = None
    """A run folder, whose newest sound checkpoint is taken, or one checkpoint in it; unless given,
    the run in out/ that saved last."""
    prompt: str | None = None
    """The text that is continued; unless given, a new document, or after a line break, begins.
    A t5 answers it, and <extra_id_0>, <extra_id_1>, .. stand for what it lacks; a glm fills in
    each [MASK]."""
    whole: bool = False
    """Let the model see all tokens so far, as Hugging Face's library does, and not only the last
    context_length; for models without a table of positions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when each local rank has a GPU of its own."""
    pp_size: Count = 1
    """Pipeline-parallel size; the number of ranks / pp_size is the tensor-parallel one."""
    nproc: LocalRanks | None = None
    """Start this many ranks on this machine; leave it out under torchrun."""


def without_window(model: GPTConfig, tokens: int) -> GPTConfig:
    """The model with a context of so many tokens at least. Raises ConfigError if it has a table of
    positions, which ends."""
    if model.has_position_table:
        raise ConfigError(
            f"whole is for models without a table of positions, and "
            f"architecture={model.architecture} has a table of "
            f"context_length={model.context_length}; leave --whole out"
        )
    return replace(model, context_length=max(model.context_length, tokens))


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    command = parse_flags(GenerateCommand, argv, "python -m rosetrainer generate")
    parallel = ParallelConfig(dp_size=1, pp_size=command.pp_size)
    world_size, starts = ranks_to_start("generate", argv, command.nproc, parallel)
    path = command.run or latest_run()
    config, tokenizer = read_run(run_of(path))
    model = config.model
    model.check(parallel.resolve(world_size)[0])
    parallel.check_pipeline(model, 1)
    fills_in = model.architecture in BLANKS
    if fills_in:
        prompt = prompt_with_blanks(command.prompt, tokenizer, model)
    else:
        prompt = first_tokens(command.prompt, tokenizer)
    if command.whole:
        model = without_window(model, len(prompt) + command.sampling.tokens)
    if fills_in:
        check_room(prompt, model)
    if starts:
        return launch(world_size, ["generate", *argv])
    device = choose_device(command.device)
    parallel.check_device(device.type)
    if device.type == "cpu":
        here = world_from_environment()[3]
        check_memory(model, 4, "weights", here / world_size)
    set_threads(0)
    context = init_parallel(parallel, command.device)
    trained = load_model(path, model, context)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character

    def write(text: str) -> None:
        if context.rank == 0:
            print(text, end="", flush=True)

    if fills_in:
        tokenizer = pieces_with_blanks(tokenizer, model)
        texts = fill_in(trained, prompt, tokenizer, command.sampling, context)
    else:
        write(command.prompt or "")
        ids = torch.tensor(prompt, device=context.device)
        tokens = generate(trained, ids, command.sampling, context, tokenizer.end_of_text)
        texts = tokenizer.stream(tokens)
    for text in texts:
        write(text)
    write("\n")
    end_parallel()
    return 0
