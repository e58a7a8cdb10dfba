"""A stand-in for rosetrainer in test_launch.py: `launch N mode words...`, or a rank in a mode.

It imports torch only where a mode needs a collective, so that a rank starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

RANK = int(os.environ.get("RANK", "0"))
PIDS = Path(os.environ.get("PROBE_PIDS", "."))

if "RANK" in os.environ:  # a rank that is being started and has not come to run_rank
    PIDS.with_suffix(".starting").touch()
    while "PROBE_IS_SIGNALLED_EARLY" in os.environ:
        time.sleep(0.005)

from rosetrainer.launch import launcher, rank  # noqa: E402
from rosetrainer.launch.errors import ERROR_REPORT, RankError  # noqa: E402
from rosetrainer.launch.rank import run_rank  # noqa: E402
from rosetrainer.validation import ConfigError  # noqa: E402


def meet() -> None:
    """Writes this rank's pid for the test, and waits for the other ranks."""
    part = PIDS.with_suffix(f".{RANK}")
    part.write_text(str(os.getpid()))
    part.replace(PIDS / str(RANK))
    while len(list(PIDS.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.005)


def state(pid: int) -> str:
    """The process's letter in ps, or nothing if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = ["ps", "-o", "state=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True).stdout[:1]
    return ""


def stay() -> None:
    while True:
        time.sleep(60)


def hold() -> None:
    """Holds a lock to the end of this process, however it ends; waits for a holder's end before."""
    fcntl.flock(os.open(PIDS.with_suffix(".lock"), os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)


def on_signals(what: Callable[[int], object]) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda received, _: what(received))


def ignore(signum: int) -> None:
    """A handler that does nothing."""


def save_and_leave(signum: int) -> None:
    """When the test says that it has saved for long enough."""
    while not PIDS.with_suffix(".saved").exists():
        time.sleep(0.005)
    sys.stdout.write(f"saved after {signal.Signals(signum).name}\n")
    sys.exit(0)


def until_the_end_of(rank: int) -> None:
    """Until the launcher has seen that this rank has ended."""
    pid = int((PIDS / str(rank)).read_text())
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            time.sleep(0.001)


def show(words: list[str]) -> None:
    size, threads = os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]
    # One write: print makes two where Python is unbuffered, and the ranks' lines would mix.
    sys.stdout.write(f"rank {RANK} of {size}, threads {threads}, {words}\n")


def crash(words: list[str]) -> None:
    """Rank 1 fails; the others sleep, or fail a little later because it did."""
    if RANK == 1:
        hold()
    meet()
    if RANK == 1:
        raise RuntimeError("boom")
    if words == ["connection"]:
        hold()  # rank 1's end breaks a connection
        raise RuntimeError("lost connection")
    stay()


def stubborn(words: list[str]) -> None:
    """Rank 1 fails while rank 0 takes no notice of SIGTERM."""
    on_signals(ignore)
    crash(words)


def deaf(words: list[str]) -> None:
    """Takes no notice of signals."""
    on_signals(ignore)
    meet()
    stay()


def graceful(words: list[str]) -> None:
    """Saves for a while when it is told to end."""
    on_signals(save_and_leave)
    meet()
    stay()


def one_deaf(words: list[str]) -> None:
    """Rank 0 takes no notice of signals, its peer saves."""
    on_signals(ignore if RANK == 0 else save_and_leave)
    meet()
    stay()


def slow_step(words: list[str]) -> None:
    """Told to end, half of its first step is done; a save then takes as long as a step."""

    def finish(signum: int) -> None:
        rank.STOP.waits_for_step = True
        rank.STOP.step_began = time.monotonic() - float(words[0]) / 2
        rank.STOP._obey(signal.Signals(signum))
        save_and_leave(signum)

    on_signals(finish)
    meet()
    stay()


def save_fails(words: list[str]) -> None:
    """Rank 1 fails when it is told to end."""

    def fail(signum: int) -> None:
        raise RuntimeError("boom")

    on_signals(fail if RANK == 1 else save_and_leave)
    meet()
    stay()


def suspended(words: list[str]) -> None:
    """Rank 0 suspends itself; its peer then fails, stays, or saves like rank 0 when told to end."""
    on_signals(save_and_leave if words == ["graceful"] else ignore)
    meet()
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    while state(int((PIDS / "0").read_text())) != "T":
        time.sleep(0.005)
    if words == ["crash"]:
        raise RuntimeError("boom")
    stay()


def explained(words: list[str]) -> None:
    """Rank 1 is the first to fail, and slower to report it than rank 0."""
    meet()
    if words == ["1"] and RANK == 1 and os.environ["WORLD_SIZE"] == "2":
        until_the_end_of(0)
    is_first = str(RANK) in words
    ERROR_REPORT.is_first = lambda: is_first
    raise RankError("the disk is full" if is_first else "a connection is lost")


def lost(words: list[str]) -> None:
    meet()
    raise RuntimeError("[../transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37")


def starved(words: list[str]) -> None:
    """Rank 1 gets no memory; rank 0 complains about that afterwards."""
    meet()
    if os.environ["WORLD_SIZE"] == "2" and RANK == 0:
        until_the_end_of(1)
        raise RuntimeError("lost connection")
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
    )


def pipe(words: list[str]) -> None:
    """Rank 0 prints until nobody reads that, and rank 1 then complains about rank 0."""
    meet()
    if RANK == 0:
        while True:
            print("a line")
    until_the_end_of(0)
    raise RuntimeError("lost connection")


def mistake(words: list[str]) -> None:
    meet()
    raise ConfigError("tp_size=3 does not fit; tp_size can be 1 or 2")


def killed(words: list[str]) -> None:
    """Rank 1 is killed; rank 0 complains about that, before it is seen or after, or sleeps."""
    if RANK == 1:
        hold()
    meet()
    if RANK == 1:
        if words == ["seen late"]:
            until_the_end_of(0)
        os.kill(os.getpid(), signal.SIGKILL)
    if words == ["connection"]:
        hold()  # rank 1's end breaks a connection
    if words != ["sleep"]:
        raise RuntimeError("lost connection")
    stay()


def killed_by(words: list[str]) -> None:
    os.kill(os.getpid(), int(words[0]))


def status(words: list[str]) -> None:
    sys.exit(int(words[0]) if RANK == 1 else 0)


def sleep(words: list[str]) -> None:
    """It loses a KeyboardInterrupt, which is what torch's import can do."""
    meet()
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            stay()


def collective(words: list[str]) -> None:
    """Rank 0 hangs in an all-reduce that rank 1 never joins; both want to survive SIGTERM."""
    import torch
    import torch.distributed as dist

    from rosetrainer.launch import process_group

    on_signals(ignore)
    process_group.init_process_group("cpu", timedelta(seconds=300))
    meet()
    if RANK == 0:
        dist.all_reduce(torch.ones(1))
    stay()


def interrupt(words: list[str]) -> None:
    raise KeyboardInterrupt


MODES: dict[str, Callable[[list[str]], None]] = {
    mode.__name__: mode
    for mode in [
        *(show, crash, stubborn, mistake, killed, killed_by, status, sleep, collective, interrupt),
        *(
            deaf,
            one_deaf,
            graceful,
            slow_step,
            save_fails,
            suspended,
            explained,
            pipe,
            lost,
            starved,
        ),
    ]
}


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        # Tests that a shell runs in the background, or under nohup, inherit that these are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nohup = "PROBE_NOHUP" in os.environ
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        for name in ("POLL_SECONDS", "TERMINATE_SECONDS"):
            setattr(launcher, name, float(os.environ.get(name, getattr(launcher, name))))
        again = os.environ.get("SECOND_SIGNAL_SECONDS", rank.SECOND_SIGNAL_SECONDS)
        rank.SECOND_SIGNAL_SECONDS = float(again)
        threads = int(os.environ.get("PROBE_THREADS", "0"))
        rank.STOP.grace = float(os.environ.get("PROBE_GRACE", rank.GRACE))
        sys.exit(launcher.launch(int(sys.argv[2]), sys.argv[3:], threads, "launch_probe"))
    run_rank(lambda: MODES[sys.argv[1]](sys.argv[2:]))
