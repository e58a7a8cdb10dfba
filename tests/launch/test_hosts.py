"""Two hosts on one machine: network namespaces, each with a name that leads to 127.0.1.1.

`make test-hosts`; it needs root. What a user types on each host runs on each host.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import LONGEST_SECONDS

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
FLAGS = [
    *("--n-layers", "1", "--n-heads", "2", "--d-model", "16", "--context-length", "16"),
    *("--global-batch-size", "8", "--eval-every", "0", "--checkpoint-every", "5"),
    *("--tp-size", "2", "--dtype", "float32"),
]
NAMED = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'

pytestmark = pytest.mark.skipif(
    not os.environ.get("HOSTS") or sys.platform != "linux" or os.geteuid() != 0,
    reason="make test-hosts, as root on Linux: it makes network namespaces",
)


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
        for name in self.names:
            ip("netns", "del", name)

    def lose(self, host: int) -> None:
        """All that runs there ends at once, as by a power cut."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def start(self, host: int, *flags: str, **environment: str) -> subprocess.Popen[str]:
        """torchrun's own lines for two machines, one rank each."""
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "--mount"]
        named = ["sh", "-c", NAMED, "sh", f"host{host}", str(self.folder / f"hosts{host}")]
        meeting = [f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}", "--nproc-per-node=1"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *meeting]
        return subprocess.Popen(
            [*inside, *named, *torchrun, "-m", "rosetrainer", "train", *FLAGS, *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.remove()


def ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    texts = [process.communicate(timeout=LONGEST_SECONDS) for process in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def on_one_host(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rosetrainer", "train", "--nproc", "2", *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_two_hosts_train_as_one_does_and_the_run_goes_on_from_either(
    hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    data = ["--data", str(markov)]
    flags = [*data, "--out", str(tmp_path / "two")]
    found = ended(*(hosts.start(host, *flags, "--steps", "10") for host in (0, 1)))
    for host, (status, _, stderr) in enumerate(found):
        assert status == 0, stderr
        assert f"host{host}: gloo talks over cable{host}, {ADDRESSES[host]}, towards " in stderr
    assert on_one_host(*flags, "--steps", "15").returncode == 0
    found = ended(*(hosts.start(host, *flags, "--steps", "20") for host in (0, 1)))
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
    assert first[0] != 0 and second[0] != 0
    told = [line for line in (first[2] + second[2]).splitlines() if "does not reach" in line]
    assert any(
        "host0 (10.77.0.1, cable0) does not reach 127.0.0.1 (lo): on each" in t for t in told
    )
    assert not (tmp_path / "run").exists(), "it is found before anything is written"


def test_a_host_that_is_lost_ends_the_other_and_the_run_goes_on_on_one(
    hosts: Hosts, markov: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(markov), "--out", str(tmp_path / "run"), "--steps", "100000"]
    first, second = hosts.start(0, *flags), hosts.start(1, *flags)
    assert first.stdout
    while "step     6/" not in first.stdout.readline():
        assert first.poll() is None, first.communicate()
    hosts.lose(1)
    second.communicate()
    (status, _, stderr), *_ = ended(first)
    assert status != 0
    assert sum("error: " in line and "rank" in line for line in stderr.splitlines()) >= 1, stderr
    flags[-1] = "12"
    again = on_one_host(*flags)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
