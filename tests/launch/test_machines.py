"""Ranks on several machines: gloo's interface, and which machine does not reach which."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

from rosetrainer.launch import machines
from rosetrainer.launch.interfaces import INTERFACE
from rosetrainer.launch.machines import interface_towards, meet_machines
from rosetrainer.validation import ConfigError

OWN = {"eth0": "10.0.0.1", "eth1": "10.0.1.1"}


@pytest.fixture
def two_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(enumerate(("lo", *OWN), 1))
    monkeypatch.setattr(machines.socket, "if_nameindex", lambda: names)
    monkeypatch.setattr(machines, "addresses", lambda name: [OWN[name]])


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"master": "10.0.1.1"}, "eth1"),
        ({"master": "10.0.0.1"}, "eth0"),
        # This machine's own name leads to 127.0.1.1, as Debian installs it: the default route.
        ({"master": "127.0.0.1", machines.ANYWHERE: "10.0.0.1"}, "eth0"),
        ({machines.ANYWHERE: "10.0.1.1"}, "eth1"),  # a name that this machine cannot resolve
    ],
)
def test_the_interface_is_that_of_the_route(
    sources: dict[str, str],
    expected: str,
    two_interfaces: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines, "_source_address", lambda target: sources.get(target, ""))
    assert interface_towards("master") == expected


def test_without_a_route_there_is_one_interface_or_a_question(
    two_interfaces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_source_address", lambda target: "")
    with pytest.raises(ConfigError, match=f"set {INTERFACE}; it can be eth0, eth1$"):
        interface_towards("master")
    monkeypatch.setattr(machines, "addresses", lambda name: [OWN[name]] if name == "eth1" else [])
    assert interface_towards("master") == "eth1"
    monkeypatch.setattr(machines, "addresses", lambda name: [])
    with pytest.raises(ConfigError, match="only the loopback interface is up"):
        interface_towards("master")


def test_the_route_to_this_machine_is_over_its_loopback_interface() -> None:
    assert machines._source_address("127.0.0.1") == "127.0.0.1"
    assert machines._source_address("no such name.invalid") == ""


def meet(folder: str, local_world_size: int, unreachable: int | None) -> tuple[str, str]:
    """(gloo's interface, the error) of a rank that takes itself for one of several machines."""
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    own = {"LOCAL_RANK": rank % local_world_size, "LOCAL_WORLD_SIZE": local_world_size}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    machines.CONNECT_SECONDS = 0.2
    vars(machines)["interface_towards"] = lambda address: "lo"
    if rank // local_world_size == unreachable:
        vars(machines)["addresses"] = lambda name: ["192.0.2.1"]
    try:
        meet_machines(dist.FileStore(f"{folder}/store", world_size))
    except ConfigError as error:
        return os.environ.get(INTERFACE, ""), str(error)
    return os.environ.get(INTERFACE, ""), ""


def test_machines_that_reach_each_other_meet(tmp_path: Path) -> None:
    assert run_ranks(4, meet, str(tmp_path), 2, None) == [("lo", "")] * 4


def test_a_machine_that_is_not_reached_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    found = run_ranks(4, meet, str(tmp_path), 2, 1)
    (line,) = {error for _, error in found}
    assert "(127.0.0.1, lo) does not reach 192.0.2.1 (lo): on each machine set " in line
    assert f"set {INTERFACE} to the interface that leads to the others" in line


def test_one_machine_is_asked_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, meet, str(tmp_path), 2, None) == [("", "")] * 2


class Kept(dist.Store):
    """A store of rank 0's: rank 2 reads what has failed only once rank 0 waits for that."""

    def __init__(self) -> None:
        super().__init__()
        self.told = {f"failure of rank {rank}": b"" for rank in range(3)}
        self.told["failure of rank 1"] = b"it does not reach"
        self.wanted: list[str] = []

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.told[key] for key in keys]

    def set(self, key: str, value: str) -> None:
        self.told[key] = value.encode()

    def wait(self, keys: list[str], *_: object) -> None:
        self.wanted = [key for key in keys if key not in self.told]


def test_who_keeps_the_store_ends_after_all_have_read_why() -> None:
    store = Kept()
    for rank in (1, 0):
        with pytest.raises(ConfigError, match="it does not reach"):
            machines._raise_failures(store, rank, 3)
    assert store.wanted == ["rank 2 has read"]
