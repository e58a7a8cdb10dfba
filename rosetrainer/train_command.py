"""The command `train`. What starts ranks imports no torch: the ranks' seconds of that are enough.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m rosetrainer train --tp-size 2
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rosetrainer.config import TrainConfig
from rosetrainer.fields import Count, check_fields
from rosetrainer.flags import parse_flags, ranks_to_start
from rosetrainer.launch import launch
from rosetrainer.presets import PRESETS
from rosetrainer.stop import STOP, stop_status


@dataclass(frozen=True)
class TrainCommand:
    """Trains a GPT on a corpus that data/prepare.py wrote."""

    config: TrainConfig = field(default_factory=TrainConfig)
    preset: Literal["default", "speedrun"] = "default"
    """Settings that belong together; further flags change single ones."""
    nproc: Count | None = None
    """Start this many ranks on this machine; leave it out under torchrun."""
    prove: bool = False
    """First show who holds what, and that this layout computes what one process does."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    command = parse_command(argv)
    check_fields(command)
    config = command.config
    world_size, starts = ranks_to_start("train", argv, command.nproc, config.parallel)
    config.check(world_size)
    if starts:
        STOP.release()
        return launch(world_size, ["train", *argv], config.run.threads)
    from rosetrainer.train import check_config, train

    _, stopped_by = train(*check_config(config, world_size), command.prove)
    return stop_status(stopped_by)


def parse_command(argv: list[str]) -> TrainCommand:
    """The preset that argv names, changed by its other flags. Raises ConfigError."""
    prog = "python -m rosetrainer train"
    command = parse_flags(TrainCommand, argv, prog)
    if command.preset == "default":
        return command
    chosen = TrainCommand(PRESETS[command.preset], command.preset)
    return parse_flags(TrainCommand, argv, prog, chosen)
