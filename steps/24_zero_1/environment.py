"""What this process was started with, how it joins the others, and how it ends at a mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from config import ConfigError


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun set them; (0, 1, 0, 1) alone."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return tuple(int(os.environ.get(name, alone)) for name, alone in names.items())


def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this rank: CUDA when each local rank has a GPU of its own.

    Raises ConfigError if `wanted` is "cuda" and there are too few.
    """
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


def init_process_group(device: str, timeout: timedelta) -> torch.device:
    """Starts the process group, where there is more than one rank and none yet.

    Returns this rank's device, see choose_device, and raises what that does.
    """
    _, world_size, local_rank, local_world_size = world_from_environment()
    own = choose_device(device, local_rank, local_world_size)
    gpu = own if own.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, device_id=gpu)
    return own


def say(text: str) -> None:
    """Prints the text on rank 0 alone: one voice for all."""
    if world_from_environment()[0] == 0:
        print(text, flush=True)


class Flags(argparse.ArgumentParser):
    """A mistake in the flags is a ConfigError, like any other of the user's."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def count(text: str) -> int:
    """The type of a flag: an integer from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def run(main: Callable[[], None]) -> None:
    """main(), and status 2 for a ConfigError; all ranks make the same one, and one speaks."""
    try:
        main()
    except ConfigError as error:
        if world_from_environment()[2] == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
