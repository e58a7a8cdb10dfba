"""How ranks meet: in a file under our launcher, else at the address that torchrun gives."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rosetrainer.environment import choose_device, world_from_environment
from rosetrainer.fields import ConfigError
from rosetrainer.rank import MEETING

PATIENCE_SECONDS = 60
"""How much longer than the hang watch a collective waits: the watch can name the rank at fault."""


def own_device(wanted: str) -> torch.device:
    """This rank's device, see choose_device."""
    _, _, local_rank, local_world_size = world_from_environment()
    return choose_device(wanted, local_rank, local_world_size)


def meet(device: str, timeout_seconds: float = 300.0) -> dist.Store | None:
    """Starts the default process group, where there is more than one rank and none is there yet.

    Gives the store in which the ranks met. Raises ConfigError if its port is taken.
    """
    rank, world_size, _, _ = world_from_environment()
    if world_size == 1 or dist.is_initialized():
        return None
    own = own_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    folder = os.environ.get(MEETING)
    try:
        if folder:
            store: dist.Store = dist.FileStore(str(Path(folder) / "store"), world_size)
        else:
            kept, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
            # torchrun keeps one store for all its restarts: nobody may read a dead rank's address.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", kept)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT", "")
        raise ConfigError(
            f"port {port} is in use on this machine; choose another: torchrun's --master-port, or "
            f"MASTER_PORT where you start the ranks yourself"
        ) from None
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo",
        store=dist.PrefixStore("process group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=own if own.type == "cuda" else None,
    )
    return store
