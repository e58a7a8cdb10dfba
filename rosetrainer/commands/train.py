"""The command `train`. What starts ranks imports no torch: the ranks' seconds of that are enough.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m rosetrainer train --tp-size 2
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rosetrainer.commands.presets import PRESETS, PresetName
from rosetrainer.config import GPTConfig, TrainConfig
from rosetrainer.environment import LAUNCHED, world_from_environment
from rosetrainer.hardware.memory import (
    give_back_freed_memory,
    keep_freed_memory,
    no_garbage_collection,
)
from rosetrainer.launch.interfaces import own_host
from rosetrainer.launch.rank import GRACE, STOP, stop_status
from rosetrainer.validation import ConfigError, Count, CountOrZero, LocalRanks, config_from_dict

PORT = "29500"
"""Where the ranks of several machines meet, unless MASTER_PORT says another."""

READ = "ROSETRAINER_COMMAND"
"""Environment variable: the command as JSON, for ranks, which then need not read flags again."""


@dataclass(frozen=True)
class TrainCommand:
    """Trains a GPT on a corpus that `prepare` wrote."""

    config: TrainConfig = field(default_factory=TrainConfig)
    preset: PresetName = "default"
    """Settings that belong together, or a model by its name; further flags change single ones."""
    nproc: LocalRanks | None = None
    """Start this many ranks on this machine; leave it out under torchrun."""
    hosts: str | None = None
    """Addresses of several machines, with commas between them; the command runs on each."""
    host_rank: CountOrZero | None = None
    """Which of the hosts this is, from 0; found out unless given."""
    grace: Count = GRACE
    """Most seconds for a step and a save after a signal; Slurm gives 30, spot machines to 120."""

    def machines(self) -> tuple[list[str], int]:
        """Addresses of all machines, none where there is one, and which this is.

        Raises ConfigError.
        """
        hosts = [host.strip() for host in self.hosts.split(",")] if self.hosts else []
        given, count = self.host_rank, len(set(hosts) - {""})
        if hosts and not 1 < count == len(hosts):
            raise ConfigError(f"hosts={self.hosts} should be two or more addresses, A,B say")
        if given is not None and given >= count:
            raise ConfigError(
                f"host_rank={given} is the number of one of the hosts, and there are {count}; "
                + (f"it can be 0 to {count - 1}" if hosts else "give --hosts A,B too")
            )
        return hosts, own_host(hosts) if given is None and hosts else given or 0


T = TypeVar("T", bound=TrainCommand)


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before any process group starts."""
    if LAUNCHED in os.environ:
        read = json.loads(os.environ[READ])
        return run_rank_of(config_from_dict(TrainCommand, read, READ), world_from_environment()[1])
    from rosetrainer.commands.flags import ranks_to_start
    from rosetrainer.launch.launcher import launch

    command = parse_command(argv)
    config = command.config
    hosts, host_rank = command.machines()
    nproc = command.nproc or (1 if hosts else None)
    ranks_here, starts = ranks_to_start("train", argv, nproc, config.parallel)
    config.check(ranks_here * max(len(hosts), 1))
    if not starts and not hosts:
        return run_rank_of(command, ranks_here)
    os.environ[READ] = json.dumps(asdict(command), default=str)
    STOP.grace = command.grace
    if hosts:
        os.environ["MASTER_ADDR"] = hosts[0]
        os.environ.setdefault("MASTER_PORT", PORT)
    machine = (host_rank, max(len(hosts), 1))
    return launch(ranks_here, ["train", *argv], config.hardware.threads, machine=machine)


def run_rank_of(command: TrainCommand, world_size: int) -> int:
    """Trains on this rank."""
    STOP.grace = command.grace
    with no_garbage_collection():
        from rosetrainer.training.setup import check_config, train
    if command.config.parallel.zero == 3:  # which gathers and frees all the time
        give_back_freed_memory()
    else:
        keep_freed_memory()
    _, stopped_by = train(*check_config(command.config, world_size))
    return stop_status(stopped_by)


def parse_command(argv: list[str]) -> TrainCommand:
    """The preset that argv names, with the model of --init-from, changed by its other flags.

    Raises ConfigError.
    """
    return parse_train_flags(TrainCommand, argv, "train")


def parse_train_flags(cls: type[T], argv: list[str], name: str) -> T:
    """As parse_command, for a command that has flags of its own beside those of train."""
    from rosetrainer.commands.flags import parse_flags

    prog = f"python -m rosetrainer {name}"
    command = parse_flags(cls, argv, prog)
    folder, flags = command.config.run.init_from, PRESETS[command.preset].split()
    if folder is None:  # of two values of a flag the last one counts
        return parse_flags(cls, [*flags, *argv], prog) if flags else command
    if flags:
        raise ConfigError(
            f"preset={command.preset} brings a model, and so does init_from={folder}; give one of "
            f"the two"
        )
    from rosetrainer.checkpoint.huggingface.families import model_of

    model = model_of(folder) if folder.exists() else begun_with(command.config) or model_of(folder)
    return parse_flags(cls, argv, prog, cls(replace(TrainConfig(), model=model)))


def begun_with(config: TrainConfig) -> GPTConfig | None:
    """The model of a run that began with the folder of --init-from, which is not there any more:
    its checkpoints have all that going on takes."""
    from rosetrainer.checkpoint.run_folder import RUNS, read_config, run_of

    runs = [config.run.out] if config.run.out else sorted(RUNS.glob("run-*"), reverse=True)
    if config.checkpoint.resume not in ("auto", "never"):
        runs.insert(0, run_of(Path(config.checkpoint.resume)))
    for run in runs:
        with contextlib.suppress(ConfigError):  # of another version, or no run
            saved = read_config(run)
            if saved.run.init_from == config.run.init_from:
                return saved.model
    return None
