"""Proof on demand: who holds what, and whether this layout computes what one process does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rosetrainer.checkpoint.huggingface.families import model_of
from rosetrainer.checkpoint.huggingface.load import find_weights
from rosetrainer.commands.flags import parse_flags, ranks_to_start
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.environment import world_from_environment
from rosetrainer.hardware.performance import choose_dtype, set_threads
from rosetrainer.launch.launcher import launch
from rosetrainer.model_size import check_memory
from rosetrainer.parallel.context import end_parallel, init_parallel
from rosetrainer.proof.batches import micro_batches_of
from rosetrainer.proof.oracles import check_oracle
from rosetrainer.proof.report import show_proof
from rosetrainer.validation import LocalRanks

PROG = "python -m rosetrainer parity"


@dataclass(frozen=True)
class ParityCommand:
    """Shows who holds what, and proves that a layout computes what one process does."""

    model: GPTConfig = field(default_factory=GPTConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """What training would use; float64 is always shown beside it."""
    kernels: Literal["auto", "torch", "ours"] = "auto"
    """Whose kernels compute on a CPU; auto: those that training would use."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Whose updates are compared, after one step of SGD."""
    whole: bool = False
    """Prove all of context_length; without it at most 640 tokens of it."""
    init_from: Path | None = None
    """Folder of a Hugging Face checkpoint whose model and weights are proven, not random ones."""
    nproc: LocalRanks | None = None
    """Start this many ranks on this machine; leave it out under torchrun."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    command = parse_flags(ParityCommand, argv, PROG)
    if command.init_from is not None:
        model = ParityCommand(model_of(command.init_from))
        command = parse_flags(ParityCommand, argv, PROG, model)
    world_size, starts = ranks_to_start("parity", argv, command.nproc, command.parallel)
    tp_size, _ = command.parallel.resolve(world_size)
    command.model.check(tp_size, command.parallel.sequence_parallel)
    micro_batches = micro_batches_of(command.parallel)
    command.parallel.check_pipeline(command.model, micro_batches)
    check_oracle(command.model)
    given = None if command.init_from is None else find_weights(command.init_from, command.model)
    if starts:
        return launch(world_size, ["parity", *argv])
    # The one process that every rank compares with: its position table can be a short one.
    dense, here = replace(command.model, context_length=1), world_from_environment()[3]
    check_memory(dense, 96, "one process's float64 weights and training state on each rank", here)
    set_threads(0)
    context = init_parallel(command.parallel, "cpu")
    dtype = choose_dtype(command.dtype, context.device)
    optim = OptimConfig(optimizer=command.optimizer)
    show_proof(command.model, context, dtype, optim, command.whole, given, command.kernels)
    end_parallel()
    return 0
