"""What counts as work for the hang watch, in a time that the test makes."""

from __future__ import annotations

import hashlib
import io
import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch.distributed as dist
from ranks import run_ranks

from rosetrainer import durable_files
from rosetrainer.durable_files import sha256_of, sync_file, write_whole
from rosetrainer.heartbeat import HEARTBEAT, Heartbeat, IdleClock
from rosetrainer.launch.watch import POLL_SECONDS, HangWatch, compiles, processor_seconds


def idle(*looks: tuple[float, int, float], seconds: float = 10.0) -> list[float]:
    """What a clock says at each look: (time, count, processor seconds)."""
    clock, found, before = IdleClock(seconds), [], 0.0
    for now, count, processor in looks:
        found.append(clock.look(now - before, count, processor))
        before = now
    return found


def test_a_rank_is_idle_since_its_last_sign() -> None:
    assert idle((1, 0, 0), (3, 0, 0), (4, 1, 0), (6, 1, 0), (9, 1, 0)) == [0, 2, 0, 2, 5]


def test_processor_time_is_work_and_the_little_that_waiting_takes_is_not() -> None:
    """As a compilation, or a batch that takes longer than the timeout."""
    busy = idle(*((float(t), 0, 0.3 * t) for t in range(1, 60)))
    assert max(busy) < 10
    waiting = idle(*((float(t), 0, 0.01 * t) for t in range(1, 20)))
    assert waiting[-1] == 18


def test_an_endless_loop_is_no_work() -> None:
    busy = idle(*((float(t), 0, float(t)) for t in range(1, 200)))
    last = 10 * IdleClock.ENDLESS
    assert max(busy[: last - 1]) < 10
    assert busy[last + 10] > 10


def stopped_for_an_hour(folder: Path) -> float:
    """How long a rank has been idle by three looks; before each of them an hour passes."""
    watch = HangWatch(dist.FileStore(str(folder / "store"), 1), 0, 1, 600.0)
    watch.close()
    looks = mock.patch.object(watch._ended, "wait", side_effect=(False, False, False, True))
    with looks, mock.patch("time.monotonic", side_effect=itertools.count(1e9, 3600.0)):
        watch._measure()
    return watch._idle


def test_a_process_that_stood_still_was_not_idle(tmp_path: Path) -> None:
    """As when a laptop sleeps, or Ctrl-Z stops all ranks for an hour."""
    assert run_ranks(1, stopped_for_an_hour, tmp_path) == [2 * POLL_SECONDS]


def crowd() -> tuple[float, float]:
    """What counts as processor time, and what the main thread ran, with a rival on its core."""
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(0, core)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(rival.pid, core)
        counted, ran = processor_seconds(), time.thread_time()
        while time.thread_time() - ran < 0.2:
            pass
        now = processor_seconds()
        assert counted is not None
        assert now is not None
        return now - counted, time.thread_time() - ran
    finally:
        rival.kill()
        rival.wait()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux tells of the queue")
def test_to_stand_in_line_for_a_processor_is_work() -> None:
    """On a crowded machine a rank at work runs little longer than one that waits."""
    ((counted, ran),) = run_ranks(1, crowd)
    assert counted > 1.2 * ran


def test_a_file_that_grows_is_work(tmp_path: Path) -> None:
    heart, path = Heartbeat(), tmp_path / "file"
    heart.growing.add(path)
    seen = [heart.count()]  # it is not there yet
    for content in (b"a", b"abc"):
        path.write_bytes(content)
        seen.append(heart.count())
        assert heart.count() == seen[-1]  # one that does not grow is not
    assert seen == [0, 1, 3]


def test_a_library_that_writes_a_file_in_one_call_is_seen_at_work(tmp_path: Path) -> None:
    seen: list[int] = []

    def write(part: Path) -> None:
        for size in (10, 20, 30):
            part.write_bytes(bytes(size))
            seen.append(HEARTBEAT.count())

    write_whole(tmp_path / "file", write)
    assert len(set(seen)) == 3
    assert not HEARTBEAT.growing


def test_hashing_says_so_block_by_block() -> None:
    seen: list[int] = []

    class File(io.BytesIO):
        def open(self, mode: str) -> File:
            return self

        def read(self, size: int | None = -1) -> bytes:
            seen.append(HEARTBEAT.count())
            return super().read(size)

    content = bytes(range(256)) * 2**13  # 2 MiB
    assert sha256_of(cast(Path, File(content))) == hashlib.sha256(content).hexdigest()
    assert len(seen) == len(set(seen)) == 3  # the last one finds the end


def test_syncing_says_so_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_files, "SYNC_BYTES", mmap.PAGESIZE)
    path, content = tmp_path / "file", bytes(range(256)) * 2**9
    path.write_bytes(content)
    before = HEARTBEAT.count()
    sync_file(path)
    assert HEARTBEAT.count() == before + len(content) // mmap.PAGESIZE
    assert path.read_bytes() == content
    path.write_bytes(b"")
    sync_file(path)


def compiling() -> list[bool]:
    """Whether that is seen before, within and after a compilation, by another thread."""
    import torch

    seen: list[bool] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: seen.append(compiles()))
        thread.start()
        thread.join()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        look()
        return graph.forward

    look()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    look()
    return seen


def test_a_compilation_is_seen_from_another_thread() -> None:
    assert run_ranks(1, compiling) == [[False, True, False]]
