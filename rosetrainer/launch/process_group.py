"""How ranks meet: in a file under our launcher, else at the address that torchrun gives."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rosetrainer.environment import choose_device, name_ranks, world_from_environment
from rosetrainer.launch.errors import ERROR_REPORT, RankError
from rosetrainer.launch.machines import meet_machines
from rosetrainer.launch.rank import RENDEZVOUS_DIR
from rosetrainer.validation import ConfigError

WATCH_MARGIN_SECONDS = 24 * 3600
"""How much longer a collective waits than the hang watch, which ends ranks that hang, with the name
of the one at fault, and lets them wait for one that is at work."""

FOLLOW_SECONDS = 30
"""How long a rank without a store waits to be ended, for the one that reports it may come later."""

START_SECONDS = 120
"""So long, at least, a rank may need to import torch and come to the others."""


def open_store(timeout: timedelta) -> dist.Store | None:
    """The store in which the ranks meet, where there is more than one and they have not met yet.

    It waits for nobody but its host, so that the hang watch is there before ranks wait for ranks.
    Raises ConfigError if its address is not given or its port is taken, RankError if its host does
    not answer.
    """
    rank, world_size, _, _ = world_from_environment()
    if world_size == 1 or dist.is_initialized():
        return None
    if folder := os.environ.get(RENDEZVOUS_DIR):
        return dist.FileStore(str(Path(folder) / "store"), world_size)
    check_address(world_size)
    seconds = max(timeout.total_seconds(), START_SECONDS)
    try:
        # As if for one rank: the host of a store for more waits here until all have come.
        found = dist.rendezvous("env://", rank, 1, timeout=timedelta(seconds=seconds))
        kept, _, _ = next(found)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            port = os.environ["MASTER_PORT"]
            raise ConfigError(
                f"port {port} is in use on this machine; choose another: torchrun's --master-port, "
                f"or MASTER_PORT where you start the ranks yourself"
            ) from None
        text = f"{store_host()} has not answered in {seconds:g} s; has it started, and can this "
        ERROR_REPORT.is_first = lambda: rank == 1  # for there is no store to count them
        if rank != 1:
            time.sleep(FOLLOW_SECONDS)
        raise RankError(text + "machine reach it?") from None
    # torchrun keeps one store for all its restarts: nobody may read a dead rank's address.
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", kept)


def store_host() -> str:
    """Who keeps the store, for a message."""
    if folder := os.environ.get(RENDEZVOUS_DIR):
        return f"the file {Path(folder) / 'store'}, in which the ranks meet,"
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"torchrun's process that keeps the ranks' store at {address}"
    return f"rank 0, which keeps the ranks' store at {address},"


def init_process_group(
    device: str, timeout: timedelta, store: dist.Store | None = None
) -> torch.device:
    """Starts the default process group, where there is more than one rank and none yet.

    store: from open_store, which is otherwise called here. Returns this rank's device. Raises what
    choose_device and open_store do, and ConfigError if two ranks have the same GPU or are on
    devices of two kinds.
    """
    own = choose_device(device)
    gpu = own if own.type == "cuda" else None
    store = store or open_store(timeout)
    rank, world_size, _, _ = world_from_environment()
    if store:
        store.set_timeout(timeout)
        check_devices(store, rank, world_size, own.type, gpu_uuid(own))
        if not gpu:
            meet_machines(dist.PrefixStore("machines", store))
    if gpu:
        torch.cuda.set_device(gpu)
    if store:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("process group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=gpu,
        )
    return own


def check_address(world_size: int) -> None:
    """Raises ConfigError unless MASTER_ADDR and MASTER_PORT say where the ranks meet."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if address and port.isdecimal() and 0 < int(port) < 2**16:
        return
    raise ConfigError(
        f"MASTER_ADDR={address!r} and MASTER_PORT={port!r} do not say where {world_size} ranks "
        f"meet; torchrun sets them; under srun: export MASTER_ADDR=$(scontrol show hostnames "
        f"$SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
    )


def gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_devices(store: dist.Store, rank: int, world_size: int, kind: str, gpu: str) -> None:
    """Raises ConfigError, on every rank, if two have the same GPU or devices are of two kinds.

    By the store, for ranks of gloo and of NCCL would wait for each other, and for the same GPU NCCL
    would fail later.
    """
    store.set(f"device {rank}", f"{kind} {gpu}")
    found = store.multi_get([f"device {other}" for other in range(world_size)])
    kinds, gpus = zip(*(one.decode().split(" ") for one in found), strict=True)
    if others := [other for other in range(world_size) if kinds[other] != kinds[0]]:
        raise ConfigError(
            f"{name_ranks(others)} device={kinds[others[0]]} and not {kinds[0]} like rank 0; start "
            f"all ranks with --device cpu, or so many that each has a GPU of its own"
        )
    for other, uuid in enumerate(gpus if gpu else ()):
        if (first := gpus.index(uuid)) < other:
            raise ConfigError(
                f"ranks {first} and {other} have the same GPU, {uuid}; give each rank its own "
                f"(torchrun does; srun with --gpus-per-task 1), or use --device cpu"
            )
