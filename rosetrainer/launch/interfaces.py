"""The network interface over which the ranks of one machine talk: gloo wants to be told its name.

Left to itself gloo resolves the host's name, which fails or waits on a laptop without a network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Sequence

from rosetrainer.validation import ConfigError

LOOPBACKS = ("lo", "lo0")
INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable that gloo reads."""

GET_ADDRESS = 0x8915
"""Linux's ioctl SIOCGIFADDR."""


def local_interface() -> str:
    """GLOO_SOCKET_IFNAME as the user set it, else the loopback interface, else one that works.

    Raises ConfigError if no process of this machine can reach another one: without a loopback
    interface that is up Linux delivers nothing to itself, over whatever interface.
    """
    present = [name for _, name in socket.if_nameindex()]
    given = os.environ.get(INTERFACE)
    if given:
        _check_given(given, present)
        return given
    for name in sorted(present, key=lambda name: name not in LOOPBACKS):
        if any(map(can_connect, addresses(name))):
            return name
    loopback = next((name for name in LOOPBACKS if name in present), "")
    what = f"the interface {loopback} does not work" if loopback else "no loopback interface"
    raise ConfigError(
        f"the ranks of one machine cannot reach each other: {what}; run: ip link set "
        f"{loopback or 'lo'} up (as root), or leave out --nproc and run one process"
    )


def _check_given(given: str, present: list[str]) -> None:
    """gloo takes several names with commas between them."""
    for name in given.split(","):
        if name not in present:
            raise ConfigError(
                f"{INTERFACE}={given}, and this machine has no interface {name}; it can be "
                f"{', '.join(present) or 'none'}"
            )
        found = addresses(name)
        if found and not any(map(can_connect, found)):
            raise ConfigError(
                f"{INTERFACE}={given}, and no process can be reached over {name}; is it up? unset "
                f"{INTERFACE} and the launcher looks for one that works"
            )


def addresses(name: str) -> list[str]:
    """The interface's IPv4 address, where this system tells it; a loopback's are known."""
    if name in LOOPBACKS:
        return ["127.0.0.1", "::1"]
    if sys.platform != "linux":
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, contextlib.suppress(OSError):
        answer = fcntl.ioctl(asked, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
        return [socket.inet_ntoa(answer[20:24])]
    return []


def own_host(hosts: Sequence[str]) -> int:
    """Which of these addresses is this machine's. Raises ConfigError unless one of them is."""
    own = [number for number, host in enumerate(hosts) if can_connect(host)]
    if len(own) != 1:
        raise ConfigError(
            f"hosts={','.join(hosts)}: {len(own)} of them are addresses of this machine; give "
            f"--host-rank 0 on the first, 1 on the second"
        )
    return own[0]


def can_connect(address: str) -> bool:
    """Whether a process of this machine reaches another one at this address of it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.create_server((address, 0), family=family) as server:
        where = (address, server.getsockname()[1])
        with socket.create_connection(where, timeout=2.0):
            return True
    return False
