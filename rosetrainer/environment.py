"""What this process was started with: its place among the ranks, its cores, its Python."""

from __future__ import annotations

import os
import shutil
import sys

from rosetrainer.fields import ConfigError


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun set them; (0, 1, 0, 1) alone.

    Raises ConfigError for a variable that is no number.
    """
    values = []
    for name, default in (
        ("RANK", 0),
        ("WORLD_SIZE", 1),
        ("LOCAL_RANK", 0),
        ("LOCAL_WORLD_SIZE", 1),
    ):
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise ConfigError(f"the environment's {name}={text!r} should be a number; use torchrun")
        values.append(int(text))
    rank, world_size, local_rank, local_world_size = values
    return rank, world_size, local_rank, local_world_size


def under_torchrun() -> bool:
    """Whether a launcher, torchrun or ours, has started this process as a rank."""
    return "RANK" in os.environ


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def python_command() -> str:
    """How a user here starts this very Python: for the commands that we print."""
    relative = os.path.relpath(sys.executable)
    if not relative.startswith(os.pardir):
        return relative
    on_path = shutil.which("python")
    same = on_path is not None and os.path.samefile(on_path, sys.executable)
    return "python" if same else sys.executable


def prepare_command() -> str:
    """How a user here makes a corpus, but for the source and its flags."""
    return f"{python_command()} -m rosetrainer prepare"
