"""Ranks that end well, badly, or not at all: what is printed, which status, what is left behind.

Where a test looks at several launches they run side by side: each spends two seconds on an import.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rosetrainer.fields import ConfigError
from rosetrainer.launch import launch

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Probe:
    """A running launch_probe.py, and the folder in which its ranks write their pids."""

    process: subprocess.Popen[str]
    folder: Path

    def pids(self) -> list[int]:
        return [int(file.read_text() or 0) for file in self.folder.iterdir()]

    def alive(self) -> list[int]:
        return [pid for pid in self.pids() if is_alive(pid)]

    def started(self, nproc: int) -> None:
        wait_until(lambda: len(self.pids()) == nproc, 60)

    def ended(self, seconds: float = 60) -> tuple[int, str, str]:
        """(status, standard output, standard error)"""
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, output, errors


Start = Callable[..., Probe]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts launch_probe.py; afterwards no process of it may be left."""
    probes: list[Probe] = []

    def start(*words: str, **settings: str) -> Probe:
        folder = tmp_path / f"pids{len(probes)}"
        folder.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment["PROBE_PIDS"] = str(folder)
        environment["TMPDIR"] = str(tmp_path)  # a killed launcher leaves its folder of error files
        process = subprocess.Popen(
            [sys.executable, "-m", "launch_probe", *words],
            cwd=ROOT,
            env=environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        probes.append(Probe(process, folder))
        return probes[-1]

    yield start
    left = [pid for probe in probes for pid in probe.alive()]
    running = [probe.process.pid for probe in probes if probe.process.poll() is None]
    for pid in left + running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for probe in probes:
        probe.process.communicate()
    assert not left


def is_alive(pid: int) -> bool:
    """False for a zombie too: in a container nobody may collect an orphan."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        os.kill(pid, 0)
        return True
    return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.02)


def test_good_run_is_silent_and_shares_the_cores(start: Start) -> None:
    words = ["${local_rank}", "$$", "a b"]
    status, output, errors = start("launch", "2", "show", *words).ended()
    assert (status, errors) == (0, "")
    threads = max(1, CORES // 2)
    assert sorted(output.splitlines()) == [
        f"rank {rank} of 2, threads {threads}, {words}" for rank in range(2)
    ]


def test_threads_of_the_user_win(start: Start) -> None:
    environment = start("launch", "1", "show", OMP_NUM_THREADS="7")
    flag = start("launch", "1", "show", OMP_NUM_THREADS="7", PROBE_THREADS="5")
    assert environment.ended() == (0, "rank 0 of 1, threads 7, []\n", "")
    assert flag.ended() == (0, "rank 0 of 1, threads 5, []\n", "")


def test_first_error_is_shown_once(start: Start) -> None:
    """Whether the other ranks sleep, or fail because of the first one."""
    for probe in [start("launch", "3", "crash", others) for others in ("sleep", "connection")]:
        status, output, errors = probe.ended()
        assert (status, output) == (1, "")
        assert errors.startswith("error: rank 1 of 3 failed:\nTraceback (most recent call last):\n")
        assert errors.endswith("\nRuntimeError: boom\n")
        assert errors.count("Traceback") == errors.count("RuntimeError: boom") == 1


def test_killed_rank_is_named(start: Start) -> None:
    for probe in [start("launch", "2", "killed", others) for others in ("sleep", "connection")]:
        status, output, errors = probe.ended()
        assert (status, output) == (1, "")
        assert errors.startswith("error: rank 1 was killed by signal 9 (SIGKILL)")
        assert errors.count("\n") == 1


def test_status_of_a_rank_is_kept(start: Start) -> None:
    mistake = start("launch", "2", "mistake")
    three, two = start("launch", "2", "status", "3"), start("launch", "2", "status", "2")
    assert mistake.ended() == (2, "", "error: tp_size=3 does not fit; tp_size can be 1 or 2\n")
    assert three.ended() == (1, "", "error: rank 1 ended with exit status 3\n")
    assert two.ended() == (2, "", "error: rank 1 ended with exit status 2\n")


def test_rank_that_ignores_sigterm_is_ended(start: Start) -> None:
    probe = start("launch", "2", "stubborn")
    probe.started(2)
    status, _, errors = probe.ended(20)
    assert status == 1
    assert errors.endswith("\nRuntimeError: boom\n")


def test_signal_ends_all_ranks(start: Start) -> None:
    said = {"SIGINT": "interrupted", "SIGTERM": "stopped by SIGTERM", "SIGHUP": "stopped by SIGHUP"}
    probes = {name: start("launch", "2", "sleep") for name in said}
    for name, probe in probes.items():
        probe.started(2)
        for _ in range(2):  # a terminal and a parent may both send it
            probe.process.send_signal(signal.Signals[name])
        expected = (128 + signal.Signals[name], "", f"{said[name]}; all ranks have ended\n")
        assert probe.ended(20) == expected
        assert not probe.alive()


def test_signal_during_the_import_of_torch(start: Start) -> None:
    probe = start("launch", "2", "sleep")
    wait_until(probe.folder.with_suffix(".launching").exists, 30)
    time.sleep(0.3)
    probe.process.send_signal(signal.SIGINT)
    assert probe.ended(30) == (130, "", "interrupted; all ranks have ended\n")


def test_ranks_in_a_collective_end_with_the_launcher(start: Start) -> None:
    """Even if the launcher is killed, and the ranks wait for each other and ignore SIGTERM."""
    probes = {signum: start("launch", "2", "collective") for signum in ("SIGTERM", "SIGKILL")}
    for name, probe in probes.items():
        probe.started(2)
        time.sleep(0.2)
        probe.process.send_signal(signal.Signals[name])
    for probe in probes.values():
        probe.process.wait(20)
        wait_until(lambda probe=probe: not probe.alive(), 2)  # type: ignore[misc]


def test_without_the_launcher(start: Start) -> None:
    """One process, and torchrun's ranks: one of each machine speaks for all."""
    alone = start("mistake", WORLD_SIZE="1")
    rank_1 = start("mistake", WORLD_SIZE="1", RANK="1", LOCAL_RANK="1")
    interrupted = start("interrupt")
    crashed = start("crash", WORLD_SIZE="1", RANK="1")
    assert alone.ended() == (2, "", "error: tp_size=3 does not fit; tp_size can be 1 or 2\n")
    assert rank_1.ended() == (2, "", "")
    assert interrupted.ended() == (130, "", "interrupted\n")
    status, _, errors = crashed.ended()
    assert status == 1
    assert errors.endswith("RuntimeError: boom\n")


def test_no_ranks() -> None:
    with pytest.raises(ConfigError, match="nproc=0 must be 1 or more"):
        launch(0, ["train"])
