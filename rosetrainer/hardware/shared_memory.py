"""Memory that the ranks of one Linux machine share, and a socket between each two of them.

The memory has no name: it ends with the last rank that maps it. The kernel closes the sockets of a
rank that is killed, which tells the others.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Sockets = list[socket.socket]


def share_memory(group: Any, size: int) -> tuple[Tensor, Sockets] | str:
    """`size` bytes that all ranks of the group map, and a socket to each other rank, in their
    order; or what they lack. Every rank of the group calls this.

    Raises RuntimeError if another rank ends meanwhile.
    """
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    limit = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(limit)
        memory, name = -1, secrets.randbits(62)
        try:
            own = machine()
            if rank == 0:
                memory = os.memfd_create("shared by ranks")
                os.ftruncate(memory, size)
                door.bind(address(name))
                door.listen(n)
        except (AttributeError, OSError):  # not Linux; a limit on files; a sandbox
            own = 0
        row = torch.tensor([own, name])
        rows = [torch.empty_like(row) for _ in range(n)]
        dist.all_gather(rows, row, group=group)
        machines, names = torch.stack(rows).T.tolist()
        if 0 in machines or len(set(machines)) > 1:
            if memory >= 0:
                os.close(memory)
            return "no memory to share" if 0 in machines else "not on one machine"
        try:
            if rank == 0:
                peers = _hand_out(door, n, memory)
            else:
                memory, peers = _ask(door, names[0], rank, n)
        except OSError as error:
            raise RuntimeError(f"Connection closed by peer: {error}") from None
    longest = struct.pack("ll", int(limit), int(limit % 1 * 1e6))
    for peer in peers:
        os.set_inheritable(peer.fileno(), False)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, longest)
    whole = torch.frombuffer(mmap.mmap(memory, size), dtype=torch.uint8)
    os.close(memory)
    return whole, peers


def address(name: int) -> str:
    """Of no file: an abstract one, which ends with its socket."""
    return f"\0rosetrainer {name}"


def machine() -> int:
    """The same number in processes that can meet at such an address. Raises OSError elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    text = f"{boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _hand_out(door: socket.socket, n: int, memory: int) -> Sockets:
    """Rank 0 makes all sockets, and gives the other ranks the memory and theirs."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(n)]
    for rank in range(n):
        for other in range(rank):
            ends[other][rank], ends[rank][other] = socket.socketpair()
    for _ in range(1, n):
        with _accept(door) as guest:
            own = ends[guest.recv(1)[0]].values()
            socket.send_fds(guest, [b"."], [memory, *(end.fileno() for end in own)])
        for end in own:
            end.close()
    return [*ends[0].values()]


def _accept(door: socket.socket) -> socket.socket:
    """The next one of this user: others, who can read the address, are sent away."""
    while True:
        guest, _ = door.accept()
        who = guest.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", who)[1] == os.getuid():
            return guest
        guest.close()


def _ask(door: socket.socket, name: int, rank: int, n: int) -> tuple[int, Sockets]:
    """Another rank asks rank 0 for the memory and its sockets."""
    door.connect(address(name))
    door.send(bytes([rank]))
    _, files, _, _ = socket.recv_fds(door, 1, n)
    if not files:
        raise ConnectionError("its process has ended")
    return files[0], [socket.socket(fileno=file) for file in files[1:]]
