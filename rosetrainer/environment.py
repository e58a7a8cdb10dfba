"""What this process was started with: its place among the ranks, its cores, its Python."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from rosetrainer.fields import ConfigError

if TYPE_CHECKING:
    import torch

ANSWER_SECONDS = 5.0
"""For `python` on PATH to say what it is; one that says nothing is not ours."""


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


def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this rank: CUDA when each local rank has a GPU of its own.

    Raises ConfigError if `wanted` is "cuda" and there are too few.
    """
    import torch  # which who starts ranks does without: its seconds of importing are theirs

    gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted != "cpu" and gpus >= local_world_size:
        return torch.device("cuda", local_rank)
    if wanted == "cuda":
        raise ConfigError(
            f"device=cuda needs a GPU for each of the {local_world_size} local ranks, here are "
            f"{gpus}; start {gpus} ranks or use --device cpu"
            if gpus
            else "device=cuda, but torch finds no GPU here; use --device cpu"
        )
    return torch.device("cpu")


def under_torchrun() -> bool:
    """Whether a launcher, torchrun or ours, has started this process as a rank."""
    return "RANK" in os.environ


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def python_command() -> str:
    """How a user here starts this very Python, as a shell reads it: for the commands we print."""
    relative = os.path.relpath(sys.executable)
    if not relative.startswith(os.pardir):
        # A bare name would be looked for on PATH.
        return shlex.quote(relative if os.sep in relative else os.path.join(os.curdir, relative))
    on_path = shutil.which("python")
    return "python" if on_path and _is_this_python(on_path) else shlex.quote(sys.executable)


def _is_this_python(path: str) -> bool:
    """Whether what it starts has our packages.

    It is asked: one file can be the Python of many environments, and a shim is none by itself.
    """
    here = ascii((os.path.realpath(sys.prefix), sys.version)).encode()
    show = "import os, sys; print(ascii((os.path.realpath(sys.prefix), sys.version)))"
    try:
        answer = subprocess.run(
            [path, "-I", "-c", show],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.splitlines()[-1:] == [here]


def prepare_command() -> str:
    """How a user here makes a corpus, but for the source and its flags."""
    return f"{python_command()} -m rosetrainer prepare"
