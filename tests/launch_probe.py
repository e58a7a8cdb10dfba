"""A stand-in for rosetrainer in test_launch.py: `launch N mode words...`, or a rank in a mode.

It imports torch only where a mode needs a collective, so that a rank starts in a tenth of a second.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rosetrainer.fields import ConfigError
from rosetrainer.launch import launch
from rosetrainer.rank import run_rank

RANK = int(os.environ.get("RANK", "0"))
PIDS = Path(os.environ.get("PROBE_PIDS", "."))


def meet() -> None:
    """Writes this rank's pid for the test, and waits for the other ranks."""
    (PIDS / str(RANK)).write_text(str(os.getpid()))
    while len(list(PIDS.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.005)


def stay() -> None:
    while True:
        time.sleep(60)


def show(words: list[str]) -> None:
    size, threads = os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]
    # One write: print makes two where Python is unbuffered, and the ranks' lines would mix.
    sys.stdout.write(f"rank {RANK} of {size}, threads {threads}, {words}\n")


def crash(words: list[str]) -> None:
    """Rank 1 fails; the others sleep, or fail a little later because it did."""
    meet()
    if RANK == 1:
        raise RuntimeError("boom")
    time.sleep(0.02)
    if words == ["connection"]:
        raise RuntimeError("lost connection")
    stay()


def stubborn(words: list[str]) -> None:
    """Rank 1 fails while rank 0 takes no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    crash(words)


def mistake(words: list[str]) -> None:
    meet()
    raise ConfigError("tp_size=3 does not fit; tp_size can be 1 or 2")


def killed(words: list[str]) -> None:
    """Rank 1 is killed; rank 0 complains about that, or sleeps."""
    meet()
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    if words == ["connection"]:
        raise RuntimeError("lost connection")
    stay()


def status(words: list[str]) -> None:
    sys.exit(int(words[0]) if RANK == 1 else 0)


def sleep(words: list[str]) -> None:
    meet()
    stay()


def collective(words: list[str]) -> None:
    """Rank 0 hangs in an all-reduce that rank 1 never joins; both want to survive SIGTERM."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, lambda *_: None)
    dist.init_process_group("gloo")
    meet()
    if RANK == 0:
        dist.all_reduce(torch.ones(1))
    stay()


def interrupt(words: list[str]) -> None:
    raise KeyboardInterrupt


MODES: dict[str, Callable[[list[str]], None]] = {
    mode.__name__: mode
    for mode in [show, crash, stubborn, mistake, killed, status, sleep, collective, interrupt]
}


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        # A shell that runs the tests in the background has SIGINT ignored, and we inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        PIDS.with_suffix(".launching").touch()
        threads = int(os.environ.get("PROBE_THREADS", "0"))
        sys.exit(launch(int(sys.argv[2]), sys.argv[3:], threads, module="launch_probe"))
    run_rank(lambda: MODES[sys.argv[1]](sys.argv[2:]))
