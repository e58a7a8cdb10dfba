"""The interface over which ranks of one machine talk: found where it works, else asked for."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rosetrainer.launch import interfaces
from rosetrainer.launch.interfaces import INTERFACE, can_connect, local_interface
from rosetrainer.validation import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HAS_NAMESPACES = (
    sys.platform == "linux"
    and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
)

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine({name: (address, whether it works)}): the interfaces that there are."""

    def machine(found: dict[str, tuple[str, bool]], given: str = "") -> None:
        names = list(enumerate(found, 1))
        works = dict(found.values())
        monkeypatch.setenv(INTERFACE, given)
        monkeypatch.setattr(socket, "if_nameindex", lambda: names)
        monkeypatch.setattr(interfaces, "addresses", lambda name: [found[name][0]])
        monkeypatch.setattr(interfaces, "can_connect", lambda address: works[address])

    return machine


def test_the_loopback_interface_is_taken_where_it_works(machine: Machine) -> None:
    machine({"eth0": ("10.0.0.1", True), "lo": ("127.0.0.1", True)})
    assert local_interface() == "lo"
    machine({"en0": ("10.0.0.1", True), "lo0": ("127.0.0.1", True)})
    assert local_interface() == "lo0"


def test_another_interface_is_taken_where_the_loopback_one_does_not_work(machine: Machine) -> None:
    machine({"lo": ("127.0.0.1", False), "tun0": ("10.0.0.2", False), "eth0": ("10.0.0.1", True)})
    assert local_interface() == "eth0"


def test_without_any_one_line_says_what_is_missing_and_what_to_do(machine: Machine) -> None:
    machine({"lo": ("127.0.0.1", False), "eth0": ("10.0.0.1", False)})
    with pytest.raises(ConfigError, match=r"interface lo does not work; run: ip link set lo up "):
        local_interface()
    machine({"eth0": ("10.0.0.1", False)})
    with pytest.raises(ConfigError, match="no loopback interface"):
        local_interface()
    machine({})
    with pytest.raises(ConfigError, match="no loopback interface"):
        local_interface()


def test_the_users_interface_wins_and_is_checked(machine: Machine) -> None:
    found = {"lo": ("127.0.0.1", True), "eth0": ("10.0.0.1", True), "eth1": ("10.0.1.1", False)}
    machine(found, given="eth0,lo")
    assert local_interface() == "eth0,lo"
    machine(found, given="eth7")
    with pytest.raises(ConfigError, match=r"has no interface eth7; it can be lo, eth0, eth1"):
        local_interface()
    machine(found, given="eth1")
    with pytest.raises(ConfigError, match="no process can be reached over eth1"):
        local_interface()


def test_what_can_be_reached_is_found_by_trying() -> None:
    assert can_connect("127.0.0.1") or can_connect("::1")
    assert not can_connect("192.0.2.1")  # of no machine: kept for documentation


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs root, or user namespaces, and unshare")
@pytest.mark.parametrize("prepare", ["true", "ip link set lo up; ip address flush dev lo"])
def test_a_machine_without_a_loopback_interface(prepare: str, markov: Path) -> None:
    """A new network namespace has one that is down."""
    command = f"{sys.executable} -m rosetrainer train --nproc 2 --data {markov}"
    ended = subprocess.run(
        ["unshare", "-n", "sh", "-c", f"{prepare}; exec {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    assert ended.stderr.startswith("error: the ranks of one machine cannot reach each other: ")
    assert "ip link set lo up" in ended.stderr
    assert ended.stderr.count("\n") == 1
