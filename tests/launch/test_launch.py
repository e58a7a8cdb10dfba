"""Ranks that end well, badly, or not at all: what is printed, which status, what is left behind.

Where a test looks at several launches they run side by side: they spend their time on waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

import pytest
import torch.distributed as dist
from launch_probe import state
from ranks import LONGEST_SECONDS

from rosetrainer.environment import usable_cores
from rosetrainer.launch.errors import ERROR_FILE, ERROR_REPORT, LATER, explain, record
from rosetrainer.launch.launcher import launch
from rosetrainer.launch.rank import StopRequest
from rosetrainer.launch.watch import HangWatch
from rosetrainer.validation import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LESS_MEMORY = {"--micro-batch-size", "--recompute", "block,", "--tp-size", "plan`"}
CORES = usable_cores()


@dataclass
class Probe:
    """A running launch_probe.py, and the folder in which its ranks write their pids."""

    process: subprocess.Popen[str]
    folder: Path

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in self.folder.iterdir()]

    def pid(self, rank: int) -> int:
        return int((self.folder / str(rank)).read_text())

    def alive(self) -> list[int]:
        return [pid for pid in self.pids() if is_alive(pid)]

    def started(self, nproc: int) -> None:
        wait_until(lambda: len(self.pids()) == nproc or self.process.poll() is not None)
        assert self.process.poll() is None, self.ended()

    def saved(self) -> None:
        """Lets ranks that save come to their end."""
        self.folder.with_suffix(".saved").touch()

    def ended(self) -> tuple[int, str, str]:
        """(status, standard output, standard error)"""
        output, errors = self.process.communicate(timeout=LONGEST_SECONDS)
        return self.process.returncode, output, errors


Start = Callable[..., Probe]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts launch_probe.py; afterwards no process of it may be left.

    The launcher has no time limits but those that a test gives it: what ends ranks is then told by
    their end, however slow the machine.
    """
    probes: list[Probe] = []

    def start(*words: str, **settings: str) -> Probe:
        folder = tmp_path / f"pids{len(probes)}"
        folder.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment["PROBE_PIDS"] = str(folder)
        environment["TMPDIR"] = str(tmp_path)  # a killed launcher leaves its folder
        limits = ("TERMINATE_SECONDS", "SECOND_SIGNAL_SECONDS", "PROBE_GRACE")
        environment |= dict.fromkeys(limits, "1e6")
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
    return state(pid) not in ("", "Z")


def listening(pid: int) -> list[str]:
    """The addresses, in the kernel's hexadecimal digits, on which this process listens."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            own.add(os.readlink(descriptor))
    sockets = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    is_listening = "0A"
    return [
        s[1].split(":")[0] for s in sockets if s[3] == is_listening and f"socket:[{s[9]}]" in own
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.005)


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
    probes = [start("launch", "2", "killed", others) for others in ("sleep", "connection")]
    probes.append(start("launch", "2", "killed", "seen late", POLL_SECONDS="2"))
    for probe in probes:
        status, output, errors = probe.ended()
        assert (status, output) == (1, "")
        assert errors.startswith(
            "error: rank 1 was killed by signal 9 (SIGKILL); if the machine ran"
        )
        assert errors.count("\n") == 1
        assert LESS_MEMORY <= set(errors.split())


@pytest.mark.skipif(sys.platform != "linux", reason="real-time signals are Linux's")
def test_a_signal_without_a_name_is_told_by_its_number(start: Start) -> None:
    probe = start("launch", "1", "killed_by", str(signal.SIGRTMIN + 6))
    said = f"error: rank 0 was killed by signal {signal.SIGRTMIN + 6} (real-time)\n"
    assert probe.ended() == (1, "", said)


def test_a_rank_without_memory_is_told_what_needs_less(start: Start) -> None:
    launched, alone = start("launch", "2", "starved"), start("starved", WORLD_SIZE="1", RANK="0")
    for probe, rank in ((launched, "1 of 2"), (alone, "0 of 1")):
        status, output, errors = probe.ended()
        assert (status, output) == (1, "")
        line = f"error: rank {rank} ran out of memory when it asked for 4611686018427387904 bytes"
        assert errors.startswith(line)
        assert errors.count("\n") == 2
        assert LESS_MEMORY <= set(errors.split())


@pytest.fixture
def rank_3_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))


def test_every_kind_of_want_of_memory_is_known(rank_3_of_4: None) -> None:
    import torch

    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)
    with pytest.raises(MemoryError) as python:
        bytearray(2**62)
    wants = [
        *(cpu.value, python.value, OSError(errno.ENOMEM, "Cannot allocate memory")),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: not enough memory"),
    ]
    for want in wants:
        told, status = explain(want, None)
        assert told.startswith("rank 3 of 4 ran out of memory"), want
        assert status == 1
    for other in (RuntimeError("boom"), OSError(errno.ENOENT, "No such file")):
        assert "out of memory" not in explain(other, None)[0]


class StoreThatIsGone:
    """As ranks see it that had a connection to it."""

    def clone(self) -> StoreThatIsGone:
        return self

    def set(self, *_: object) -> None:
        """It was there at the start."""

    def check(self, *_: object) -> bool:
        raise dist.DistNetworkError(GONE)

    def add(self, *_: object) -> int:
        raise dist.DistNetworkError(GONE)


GONE = "Failed to recv, got 0 bytes. Connection was likely closed."


def test_where_the_rank_that_kept_the_store_has_ended_all_the_others_are_silent(
    rank_3_of_4: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has told what hangs. Where nothing hung, as if it was killed, they say what they saw."""
    monkeypatch.setattr(ERROR_REPORT, "is_first", None)
    watch = HangWatch(cast(dist.Store, StoreThatIsGone()), 3, 4, 600.0)
    watch.close()
    assert ERROR_REPORT.is_first is not None
    told = []
    for idle in (1.0, 599.0):
        watch._idle = idle
        told.append(ERROR_REPORT.is_first())
    assert told == [True, False]
    assert explain(dist.DistNetworkError(GONE), tmp_path) == (
        "rank 3 has lost its connection to another rank, which has ended; the same command "
        "goes on from the last checkpoint",
        1,
    )


def test_status_of_a_rank_is_kept(start: Start) -> None:
    mistake = start("launch", "2", "mistake")
    three, two = start("launch", "2", "status", "3"), start("launch", "2", "status", "2")
    assert mistake.ended() == (2, "", "error: tp_size=3 does not fit; tp_size can be 1 or 2\n")
    assert three.ended() == (1, "", "error: rank 1 ended with exit status 3\n")
    assert two.ended() == (2, "", "error: rank 1 ended with exit status 2\n")


def test_explained_error_is_shown_without_a_traceback(start: Start) -> None:
    """Once, by the rank that explains it, even if another one has ended before."""
    one = start("launch", "2", "explained", "1", POLL_SECONDS="2")
    none = start("launch", "2", "explained")
    assert one.ended() == (1, "", "error: the disk is full\n")
    assert none.ended() == (1, "", "error: a connection is lost\n")


def test_closed_pipe_is_no_error(start: Start) -> None:
    """`| head`: nothing to say, although rank 1 then complains about rank 0."""
    probe = start("launch", "2", "pipe")
    assert probe.process.stdout is not None
    probe.process.stdout.readline()
    probe.process.stdout.close()
    assert probe.process.wait(LONGEST_SECONDS) == 128 + signal.SIGPIPE
    assert probe.process.stderr is not None
    assert probe.process.stderr.read() == ""


def test_rank_that_does_not_follow_a_failed_one_is_ended(start: Start) -> None:
    """One that ignores SIGTERM, and one that is suspended."""
    cases = (["stubborn"], ["suspended", "crash"])
    begun = time.monotonic()
    probes = [start("launch", "2", *words, TERMINATE_SECONDS="1") for words in cases]
    for probe in probes:
        probe.started(2)
    pace = time.monotonic() - begun
    for probe in probes:
        status, _, errors = probe.ended()
        assert status == 1
        assert errors.endswith("\nRuntimeError: boom\n")
        assert not probe.alive()
    assert time.monotonic() - begun < 1 + 10 * pace


def test_signal_ends_all_ranks(start: Start) -> None:
    said = {"SIGINT": "interrupted", "SIGTERM": "stopped by SIGTERM", "SIGHUP": "stopped by SIGHUP"}
    probes = {name: start("launch", "2", "sleep") for name in said}
    for name, probe in probes.items():
        probe.started(2)
        assert all(os.getpgid(pid) == pid for pid in probe.pids())  # not in the terminal's group
        for _ in range(2):  # a terminal and a parent may both send it
            probe.process.send_signal(signal.Signals[name])
        if name == "SIGTERM":  # a machine that shuts down sends it to everyone
            for pid in probe.pids():
                os.kill(pid, signal.SIGTERM)
        expected = (128 + signal.Signals[name], "", f"{said[name]}; all ranks have ended\n")
        assert probe.ended() == expected
        assert not probe.alive()


def test_ignored_signal_stays_ignored(start: Start) -> None:
    probe = start("launch", "2", "sleep", PROBE_NOHUP="1")
    probe.started(2)
    probe.process.send_signal(signal.SIGHUP)
    assert len(probe.alive()) == 2
    probe.process.terminate()  # of two that are not ignored, the first is told
    assert probe.ended() == (143, "", "stopped by SIGTERM; all ranks have ended\n")


def test_ranks_save_before_they_leave(start: Start) -> None:
    """Two signals soon after each other are one wish; a rank's failure meanwhile is not shown."""
    saved = "saved after SIGTERM\n"
    expected = {
        ("graceful", "SIGTERM"): (0, saved * 2, "stopped by SIGTERM; all ranks have ended\n"),
        ("graceful", "SIGINT"): (130, saved * 2, "interrupted; all ranks have ended\n"),
        ("graceful", "SIGHUP"): (129, saved * 2, "stopped by SIGHUP; all ranks have ended\n"),
        ("save_fails", "SIGTERM"): (143, saved, "stopped by SIGTERM; all ranks have ended\n"),
    }
    probes = {case: start("launch", "2", case[0]) for case in expected}
    for probe in probes.values():
        probe.started(2)
    for _ in range(2):
        for (_, name), probe in probes.items():
            probe.process.send_signal(signal.Signals[name])
        time.sleep(0.3)
    for case, probe in probes.items():
        probe.saved()
        assert probe.ended() == expected[case], case
        assert not probe.alive()


def test_a_long_wait_for_a_step_and_a_save_is_announced(start: Start) -> None:
    probe = start("launch", "2", "slow_step", "34")
    probe.started(2)
    probe.process.send_signal(signal.SIGINT)
    assert probe.process.stdout is not None
    assert probe.process.stdout.readline() == (
        "finishing the step under way, then saving: about 34 s; a second signal, or Ctrl-C, ends "
        "at once\n"
    )
    probe.saved()
    expected = (130, "saved after SIGTERM\n" * 2, "interrupted; all ranks have ended\n")
    assert probe.ended() == expected


@pytest.mark.parametrize(
    ("need", "grace", "given", "said"),
    [
        (0.5, 120.0, 9.0, ""),
        (2.0, 120.0, 9.0, "then saving: about 2 s; a second signal, or Ctrl-C, ends at once"),
        (34.0, 120.0, 51.0, "finishing the step under way, then saving: about 34 s; a second"),
        (100.0, 120.0, 120.0, "about 100 s; a second signal"),
        (200.0, 250.0, 250.0, "about 200 s; a second signal"),
        (200.0, 30.0, 30.0, "about 200 s; --grace gives 30 s; a second signal, or Ctrl-C"),
        (2.0, 5.0, 5.0, "about 2 s; a second signal"),
    ],
)
def test_a_stop_has_the_time_that_was_measured_and_half_as_much_again(
    need: float,
    grace: float,
    given: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest()
    stop.grace, stop.waits_for_step, stop.save_seconds = grace, True, 1.0
    monkeypatch.setattr(stop, "seconds_left", lambda now: need)
    with mock.patch("signal.setitimer") as timer:
        stop._obey(signal.SIGTERM)
    assert timer.call_args.args == (signal.ITIMER_REAL, given)
    assert stop.signal == signal.SIGTERM
    told = capsys.readouterr().out
    assert said in told
    assert bool(told) == bool(said)


def test_a_first_save_that_nothing_was_measured_of_has_all_the_grace_time() -> None:
    stop = StopRequest()
    stop.grace, stop.waits_for_step = 70.0, True
    with mock.patch("signal.setitimer") as timer:
        stop._obey(signal.SIGTERM)
    assert timer.call_args.args == (signal.ITIMER_REAL, 70.0)


HANGS_IN_ITS_STEP = """
import os, signal, time
from rosetrainer.launch import rank
rank.STOP_SECONDS, rank.SECOND_SIGNAL_SECONDS = 0.01, 0.0
rank.STOP.waits_for_step, rank.STOP.save_seconds = True, 0.001
rank.STOP.listen()
os.kill(os.getpid(), signal.SIGTERM)
while True:
    time.sleep(60)
"""


def test_a_rank_that_does_not_end_its_step_in_that_time_ends() -> None:
    """By itself, under torchrun as well, though its main thread waits for another rank."""
    ended = subprocess.run(
        [sys.executable, "-c", HANGS_IN_ITS_STEP], cwd=ROOT, capture_output=True, text=True
    )
    said = "stopped; not saved, for the step under way has not ended within 0.01 s\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, said, "")


def test_how_long_a_stop_takes_follows_what_was_measured() -> None:
    stop = StopRequest()
    assert stop.seconds_left(100.0) == 0
    stop.step_began = 100.0
    assert stop.seconds_left(130.0) == 30 + 30  # the first one: as long again, a save like a step
    stop.end_step(140.0)
    assert stop.seconds_left(141.0) == 40 + 40  # between two steps: the next one may begin
    stop.save_seconds = 4.0
    stop.step_began = 150.0
    assert stop.seconds_left(160.0) == 30 + 4
    assert stop.seconds_left(200.0) == 50 + 4  # longer than the one before
    stop.end_step(184.0)
    stop.step_began = 200.0
    assert stop.seconds_left(210.0) == 24 + 4


def test_a_step_and_a_save_beyond_the_grace_time_are_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def warnings(grace: float) -> list[str]:
        stop = StopRequest()
        stop.grace, stop.save_seconds = grace, 12.0
        told = []
        for began in (0.0, 100.0, 200.0):
            stop.step_began = began
            told.append(stop.end_step(began + 34.0))
        return told

    assert warnings(60) == ["", "", ""]
    first, second, third = warnings(30)
    assert (first, third) == ("", "")  # the first step compiles
    assert second.startswith("warning: a step takes 34.0 s and a save 12.0 s, and --grace gives 30")
    assert "set --grace 69" in second
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    told = warnings(120)[1]
    assert "torchrun's --shutdown-timeout gives 30 s" in told
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
    assert warnings(120) == ["", "", ""]


def test_signal_while_ranks_start(start: Start) -> None:
    """No rank is left behind, and none prints what Python prints of a KeyboardInterrupt."""
    said = {"SIGINT": "interrupted", "SIGTERM": "stopped by SIGTERM"}
    probes = {name: start("launch", "4", "sleep", PROBE_IS_SIGNALLED_EARLY="1") for name in said}
    for name, probe in probes.items():
        wait_until(probe.folder.with_suffix(".starting").exists)
        probe.process.send_signal(signal.Signals[name])
    for name, probe in probes.items():
        expected = (128 + signal.Signals[name], "", f"{said[name]}; all ranks have ended\n")
        assert probe.ended() == expected
        assert len(probe.pids()) < 4


def test_second_signal_ends_ranks_at_once(start: Start) -> None:
    killed = "ranks 0 and 1 have been killed\n"
    names = ("SIGINT", "SIGTERM")
    probes = {name: start("launch", "2", "deaf", SECOND_SIGNAL_SECONDS="0.2") for name in names}
    for name, probe in probes.items():
        probe.started(2)
        probe.process.send_signal(signal.Signals[name])
    time.sleep(0.4)
    for probe in probes.values():
        assert len(probe.alive()) == 2
        probe.process.send_signal(signal.SIGINT)
    assert probes["SIGINT"].ended() == (130, "", "interrupted; " + killed)
    assert probes["SIGTERM"].ended() == (143, "", "stopped by SIGTERM; " + killed)
    assert not any(probe.alive() for probe in probes.values())


def test_rank_that_does_not_leave_is_killed_and_named(start: Start) -> None:
    """When the time for saving is over."""
    cases = {
        "one": (["one_deaf"], 1.0, "rank 0 has", "saved after SIGTERM\n"),
        "all": (["suspended"], 2.0, "ranks 0 and 1 have", ""),
        "in a collective": (["collective"], 2.0, "ranks 0 and 1 have", ""),
    }
    begun = time.monotonic()
    probes = {
        name: start("launch", "2", *words, PROBE_GRACE=str(seconds))
        for name, (words, seconds, _, _) in cases.items()
    }
    for probe in probes.values():
        probe.started(2)
    pace = time.monotonic() - begun
    begun = time.monotonic()
    for probe in probes.values():
        probe.saved()
        probe.process.terminate()
    for name, (_, seconds, who, output) in cases.items():
        killed = f"{who} been killed after {seconds:g} s; --grace gives more"
        line = f"stopped by SIGTERM; {killed}\n"
        assert probes[name].ended() == (143, output, line)
        assert seconds - 0.1 < time.monotonic() - begun < seconds + 1 + 10 * pace, name
        assert not probes[name].alive()


def test_a_suspended_rank_saves_like_the_others(start: Start) -> None:
    """A signal wakes it: nobody has to wait for it, and nothing of it is lost."""
    probe = start("launch", "2", "suspended", "graceful")
    probe.started(2)
    wait_until(lambda: state(probe.pid(0)) == "T")
    probe.saved()
    probe.process.terminate()
    saved = "saved after SIGTERM\n" * 2
    assert probe.ended() == (0, saved, "stopped by SIGTERM; all ranks have ended\n")


def test_ranks_in_a_collective_end_with_the_launcher(start: Start) -> None:
    """Even if the launcher is killed, and the ranks wait for each other and ignore SIGTERM."""
    probe = start("launch", "2", "collective")
    probe.started(2)
    time.sleep(0.2)
    probe.process.kill()
    wait_until(lambda: not probe.alive())


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks at Linux's sockets")
def test_nothing_listens_beyond_this_machine(start: Start) -> None:
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    probe = start("launch", "2", "collective")
    probe.started(2)
    assert listening(probe.process.pid) == []
    addresses = [address for pid in probe.pids() for address in listening(pid)]
    assert addresses  # gloo's own
    assert set(addresses) <= loopback
    probe.process.kill()
    wait_until(lambda: not probe.alive())


def test_launcher_imports_no_torch() -> None:
    code = "import sys; from rosetrainer.launch import launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_under_torchrun_a_mistake_stands_in_its_report(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folder = tmp_path / "pids"
    folder.mkdir()
    ended = subprocess.run(
        [*torchrun, "-m", "launch_probe", "mistake"],
        env=os.environ | {"PYTHONPATH": paths, "PROBE_PIDS": str(folder)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    report, cause = ended.stderr.split("Root Cause (first observed failure):")
    line = "  traceback : error: tp_size=3 does not fit; tp_size can be 1 or 2\n"
    assert line in cause
    assert "exitcode  : 2 " in cause
    assert "error: tp_size=3" not in report.replace(line, "")


def test_torchrun_takes_the_first_error_for_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it compares whole seconds. What makes it start ranks again it does not report."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures = {}
    for number, first in enumerate((False, True)):
        monkeypatch.setenv(ERROR_FILE, file := str(tmp_path / f"{number}.json"))
        assert record("error: boom", 10.0 if first else 9.0 + LATER)
        failures[number] = ProcessFailure(number, 1, 1, file)
    assert ChildFailedError("rosetrainer", failures).get_first_failure()[0] == 1
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert not record("error: boom", 10.0)


def test_torchrun_takes_no_lost_connection_for_the_cause(start: Start, tmp_path: Path) -> None:
    """A killed rank leaves no error: torchrun dates that by when it sees it, which is later."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    place = {"WORLD_SIZE": "1", "RANK": "0", ERROR_FILE: str(file)}
    assert start("lost", **place).ended() == (1, "", "")
    failures = {
        0: ProcessFailure(0, 1, 1, str(file)),
        1: ProcessFailure(1, 2, -signal.SIGKILL, str(tmp_path / "none.json")),
    }
    assert "rank 0 has lost its connection" in str(failures[0].message)
    assert ChildFailedError("rosetrainer", failures).get_first_failure()[0] == 1


def test_without_the_launcher(start: Start) -> None:
    """One process, and torchrun's ranks: one of each machine speaks for all."""
    alone = start("mistake", WORLD_SIZE="1")
    rank_1 = start("mistake", WORLD_SIZE="1", RANK="1", LOCAL_RANK="1")
    interrupted = start("interrupt")
    crashed = start("crash", WORLD_SIZE="1", RANK="1")
    explained = start("explained", "1", WORLD_SIZE="1", RANK="1", LOCAL_RANK="1")
    silent = start("explained", WORLD_SIZE="1")
    assert alone.ended() == (2, "", "error: tp_size=3 does not fit; tp_size can be 1 or 2\n")
    assert rank_1.ended() == (2, "", "")
    assert interrupted.ended() == (130, "", "interrupted\n")
    assert explained.ended() == (1, "", "error: the disk is full\n")
    assert silent.ended() == (1, "", "")
    status, _, errors = crashed.ended()
    assert status == 1
    assert errors.endswith("RuntimeError: boom\n")


def test_no_ranks() -> None:
    with pytest.raises(ConfigError, match="nproc=0 must be 1 or more"):
        launch(0, ["train"])
