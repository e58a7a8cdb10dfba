"""Two hosts on one machine: network namespaces, each with a name that leads to 127.0.1.1.

`make test-hosts`; it needs root. What a user types on each host runs on each host.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import LONGEST_SECONDS

from rosetrainer.commands.prepare import main as prepare

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
FLAGS = [
    *("--n-layers", "1", "--n-heads", "2", "--d-model", "16", "--context-length", "16"),
    *("--global-batch-size", "8", "--eval-every", "0", "--checkpoint-every", "5"),
    *("--tp-size", "2", "--dtype", "float32"),
]
NAMED = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
OWN_DISK = 'mount --bind "$1" "$2"; shift 2; exec "$@"'

pytestmark = pytest.mark.skipif(
    not os.environ.get("HOSTS") or sys.platform != "linux" or os.geteuid() != 0,
    reason="make test-hosts, as root on Linux: it makes network namespaces",
)

Process = subprocess.Popen[str]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two network namespaces with a cable between them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, [f"rose{os.getpid()}-{host}" for host in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
        ends = ["type", "veth", "peer", "name", "cable1", "netns", self.names[1]]
        ip("link", "add", "cable0", "netns", self.names[0], *ends)
        for host, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", f"cable{host}")
            for link in (f"cable{host}", "lo"):
                ip("-n", name, "link", "set", link, "up")
            (folder / f"hosts{host}").write_text(f"127.0.0.1 localhost\n127.0.1.1 host{host}\n")

    def remove(self) -> None:
        for host, name in enumerate(self.names):
            self.lose(host)
            ip("netns", "del", name)

    def pids(self, host: int) -> list[int]:
        command = ["ip", "netns", "pids", self.names[host]]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def lose(self, host: int) -> None:
        """All that runs there ends at once, as by a power cut."""
        for pid in self.pids(host):
            os.kill(pid, signal.SIGKILL)

    def listening(self, host: int) -> set[str]:
        """The addresses, in the kernel's digits, at which anything listens there; the store's with
        its port."""
        found = set()
        for table in ("tcp", "tcp6"):
            show = ["ip", "netns", "exec", self.names[host], "cat", f"/proc/net/{table}"]
            told = subprocess.run(show, check=True, capture_output=True, text=True)
            for _, local, _, state, *_ in map(str.split, told.stdout.splitlines()[1:]):
                address, _, port = local.partition(":")
                found |= {local if int(port, 16) == 29500 else address} if state == "0A" else set()
        return found

    def run(self, host: int, *command: str, **environment: str) -> Process:
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "--mount"]
        named = ["sh", "-c", NAMED, "sh", f"host{host}", str(self.folder / f"hosts{host}")]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return subprocess.Popen(
            [*inside, *named, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A background job ignores it, and so does all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def start(self, host: int, *flags: str, change: str = "", **environment: str) -> Process:
        """The same command on each, one rank each. change: see host_train.py."""
        module = ["host_train", change] if change else ["rosetrainer"]
        hosts = ["--hosts", ",".join(ADDRESSES)]
        command = [sys.executable, "-m", *module, "train", *hosts, *FLAGS, *flags]
        return self.run(host, *command, **environment)

    def torchrun(self, host: int, *flags: str) -> Process:
        meeting = [f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}", "--nproc-per-node=1"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *meeting]
        train = ["-m", "rosetrainer", "train", *FLAGS, *flags]
        return self.run(host, *launcher, "--max-restarts=1", *train)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.remove()


def ended(*processes: Process) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    texts = [process.communicate(timeout=LONGEST_SECONDS) for process in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def until_step(step: int, process: Process) -> None:
    assert process.stdout
    while f"step {step:5}/" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def on_one_host(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rosetrainer", "train", "--nproc", "2", *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_two_hosts_train_as_one_does_and_the_run_goes_on_from_either(
    hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    """Also where the clock of one is a day ahead."""
    data = ["--data", str(markov)]
    flags = [*data, "--out", str(tmp_path / "two")]
    found = ended(*(hosts.start(host, *flags, "--steps", "10") for host in (0, 1)))
    for host, (status, _, stderr) in enumerate(found):
        assert status == 0, stderr
        line = f"host{host}: gloo talks over cable{host}, {ADDRESSES[host]}, towards "
        assert stderr.startswith(line)
        assert stderr.count("\n") == 1
    assert on_one_host(*flags, "--steps", "15").returncode == 0
    later = [*flags, "--steps", "20"]
    found = ended(hosts.start(0, *later), hosts.start(1, *later, change="clock"))
    assert [status for status, *_ in found] == [0, 0], found
    for steps in ("10", "15", "20"):  # each changes the schedule, as it did above
        one = on_one_host(*data, "--out", str(tmp_path / "one"), "--steps", steps)
        assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert len(losses(tmp_path / "two")) == 20


def test_a_wrong_interface_ends_both_hosts_with_one_line(
    hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(markov), "--out", str(tmp_path / "run"), "--steps", "5"]
    wrong = {"GLOO_SOCKET_IFNAME": "lo"}
    first, second = ended(hosts.start(0, *flags), hosts.start(1, *flags, **wrong))
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    told = errors(first[2] + second[2])
    assert len(told) == 2
    assert any(
        "host0 (10.77.0.1, cable0) does not reach 127.0.0.1 (lo): on each" in t for t in told
    )
    assert not (tmp_path / "run").exists(), "it is found before anything is written"


@pytest.mark.parametrize("other", ["config", "corpus", "version", "disk"])
def test_what_differs_on_the_second_host_is_named_on_both_before_the_first_step(
    other: str, hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    disk, own = tmp_path / "disk", tmp_path / "own"
    flags = ["--data", str(markov), "--out", str(disk / "run"), "--steps", "5"]
    disk.mkdir()
    if other == "config":
        second = hosts.start(1, *flags, "--seed", "7")
        said = "rank 1 has seed=7 and not 1337 like rank 0; start all ranks with the same flags"
    elif other == "corpus":
        prepare(["markov", "--seed", "5", "--out", str(own)])
        second = hosts.start(1, *flags, "--data", str(own))
        said = f"rank 1 has data={own} and not {markov}, "
    elif other == "version":
        second = hosts.start(1, *flags, change="version")
        said = "rank 1 has rosetrainer=another and not "
    else:
        (own / "run").mkdir(parents=True)
        (own / "run" / ".lock").touch()  # of a run of its own
        command = [sys.executable, "-m", "rosetrainer", "train", "--hosts", ",".join(ADDRESSES)]
        mounted = ["sh", "-c", OWN_DISK, "sh", str(own), str(disk)]
        second = hosts.run(1, *mounted, *command, *FLAGS, *flags)
        said = f"rank 1 on host1 does not see {disk / 'run'} as rank 0 has it; --out has to lie on"
    for status, stdout, stderr in ended(hosts.start(0, *flags), second):
        assert status == 2, stderr
        (told,) = errors(stderr)
        assert said in told
        assert "step     1/" not in stdout


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_host_that_is_lost_ends_the_other_and_the_run_goes_on_on_one(
    moment: str, hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    """In a step it is seen at once, and in a save, for which one rank waits by the files of the
    others, by the hang watch."""
    flags = ["--data", str(markov), "--out", str(tmp_path / "run"), "--timeout", "20"]
    flags += ["--steps", "100000"]
    first = hosts.start(0, *flags)
    if moment == "step":
        second = hosts.start(1, *flags)
        until_step(6, first)
        gloo = [bytes(reversed(socket.inet_aton(one))).hex().upper() for one in ADDRESSES]
        assert hosts.listening(0) == {gloo[0], f"{'0' * 32}:{29500:04X}"}  # as in SECURITY.md
        assert hosts.listening(1) == {gloo[1]}
    else:
        mark = tmp_path / "mark"
        second = hosts.start(1, *flags, change="save", HOST_TRAIN_MARK=str(mark))
        end = time.monotonic() + LONGEST_SECONDS
        while not mark.exists():
            assert time.monotonic() < end
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
    hosts.lose(1)
    second.communicate()
    ((status, _, stderr),) = ended(first)
    assert status == 1
    (told,) = errors(stderr)
    said = {
        "step": "error: rank 0 has lost its connection to another rank, which has ended",
        "save": "error: no progress for 20 s: rank 1 gives no sign of life",
    }
    assert told.startswith(said[moment])
    # More than any checkpoint has: how far it came is the machine's affair.
    reached = [int(path.name[5:]) for path in (tmp_path / "run").glob("step_??????")]
    flags[-1] = str(max(reached, default=0) + 5)
    again = on_one_host(*flags)
    assert again.returncode == 0, again.stderr
    assert ("going on from" in again.stdout) == (moment == "step")  # else it was the first save


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_host_stops_both(
    signum: signal.Signals, hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(markov), "--out", str(tmp_path / "run"), "--steps", "100000"]
    second = hosts.start(1, *flags)
    until_step(6, first := hosts.start(0, *flags))
    first.send_signal(signum)
    (status, _, told), (other, _, echo) = ended(first, second)
    expected = 130 if signum == signal.SIGINT else 0
    assert (status, other) == (expected, 0), (told, echo)
    word = "interrupted" if signum == signal.SIGINT else "stopped by SIGTERM"
    assert f"\n{word}; saved in {tmp_path}/run/step_" in told
    assert not errors(echo)


def test_torchrun_starts_the_ranks_of_both_hosts_again(
    hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    """Where one is killed; its store, which lives on, still has what the dead have written."""
    flags = ["--data", str(markov), "--out", str(tmp_path / "run"), "--steps", "300"]
    second = hosts.torchrun(1, *flags)
    until_step(6, first := hosts.torchrun(0, *flags))
    ranks = [pid for pid in hosts.pids(1) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(ranks[0], signal.SIGKILL)
    (status, stdout, stderr), (other, _, _) = ended(first, second)
    assert (status, other) == (0, 0), stderr
    assert "going on from" in stdout
    assert len(losses(tmp_path / "run")) == 300
