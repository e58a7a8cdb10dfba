"""Several machines: over which interface gloo talks to the others, and whether each is reached.

gloo tells its peers the address of one interface. Left to itself it takes the one that the host's
own name leads to, which Debian and Ubuntu set to 127.0.1.1: then each connects to itself and waits.
"""

from __future__ import annotations

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta

import torch.distributed as dist

from rosetrainer.environment import world_from_environment
from rosetrainer.launch.interfaces import INTERFACE, LOOPBACKS, addresses
from rosetrainer.validation import ConfigError

ANYWHERE = "192.0.2.1"
"""An address of no machine (RFC 5737): the route to it is the default route."""

CONNECT_SECONDS = 10.0
"""So long a machine may take to answer another one."""


def meet_machines(store: dist.Store) -> None:
    """Sets gloo's interface, and finds out whether the machines reach each other over it.

    Does nothing where all ranks are on one machine. Raises ConfigError, on every rank, with both
    addresses and what to set, if a machine does not reach another one.
    """
    rank, world_size, local_rank, local_world_size = world_from_environment()
    if local_world_size == world_size:
        return
    by = "as set"
    if not os.environ.get(INTERFACE):
        os.environ[INTERFACE] = interface_towards(os.environ.get("MASTER_ADDR", ""))
        by = f"towards {os.environ.get('MASTER_ADDR')}"
    if local_rank > 0:  # the first rank of each machine speaks for it
        for what in ("machine", "failure"):
            store.set(f"{what} of rank {rank}", "")
        _raise_failures(store, rank, world_size)
        return
    name = os.environ[INTERFACE].split(",")[0]
    own = next(iter(addresses(name)), "127.0.0.1")
    print(f"{socket.gethostname()}: gloo talks over {name}, {own}, {by}", file=sys.stderr)
    with closing(socket.create_server(("", 0))) as server:
        store.set(f"machine of rank {rank}", f"{own} {server.getsockname()[1]} {name}")
        machines = _machines(store, world_size)
        others = [place for other, place in machines.items() if other != rank]
        with ThreadPoolExecutor(len(others)) as pool:
            missed = [place for place in pool.map(_misses, others) if place]
        told = ""
        if missed:
            address, _, theirs = missed[0].split(" ")
            told = (
                f"{socket.gethostname()} ({own}, {name}) does not reach {address} ({theirs}): on "
                f"each machine set {INTERFACE} to the interface that leads to the others, and let "
                "their ports through"
            )
        store.set(f"failure of rank {rank}", told)
        _raise_failures(store, rank, world_size)  # waits for all, who may still try to come here


def interface_towards(address: str) -> str:
    """The interface over which this machine reaches `address`, and so is reached.

    Where that is this machine itself, the one of its default route, else its only one.
    """
    names = [name for _, name in socket.if_nameindex() if name not in LOOPBACKS]
    by_address = {own: name for name in names for own in addresses(name)}
    for target in (address, ANYWHERE):
        if (source := _source_address(target)) and source in by_address:
            return by_address[source]
    if len(by_address) == 1:
        return next(iter(by_address.values()))
    raise ConfigError(
        f"which interface leads to the other machines? set {INTERFACE}; it can be "
        f"{', '.join(by_address.values()) or 'none: only the loopback interface is up'}"
    )


def _source_address(target: str) -> str:
    """This machine's own address on the way there, which the kernel knows without a packet."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.connect((target, 9))
            return str(asked.getsockname()[0])
    except OSError:
        return ""


def _machines(store: dist.Store, world_size: int) -> dict[int, str]:
    """By its first rank, each machine's address, port and interface, once all ranks have come."""
    found = store.multi_get([f"machine of rank {rank}" for rank in range(world_size)])
    return {rank: place.decode() for rank, place in enumerate(found) if place}


def _misses(place: str) -> str:
    """The place, if nothing answers there."""
    address, port, _ = place.split(" ")
    try:
        socket.create_connection((address, int(port)), CONNECT_SECONDS).close()
    except OSError:
        return place
    return ""


def _raise_failures(store: dist.Store, rank: int, world_size: int) -> None:
    every = range(world_size)
    failures = store.multi_get([f"failure of rank {other}" for other in every])
    for told in filter(None, failures):
        store.set(f"rank {rank} has read", "")
        if rank == 0:  # which keeps the store: who has not read by then would only lose it
            with suppress(RuntimeError):
                within = timedelta(seconds=CONNECT_SECONDS)
                store.wait([f"rank {other} has read" for other in every], within)
        raise ConfigError(told.decode())
