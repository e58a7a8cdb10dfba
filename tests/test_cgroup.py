"""A CPU quota of a control group counts as cores, wherever in the tree it is set."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rosetrainer import environment
from rosetrainer.cgroup import cpu_quota

NONE = float("inf")
V2, HYBRID = "0::/a/b\n", "0::/\n3:memory:/a/b\n2:cpu,cpuacct:/a/b\n1:cpuset:/\n"
TREES: dict[str, tuple[str, dict[str, str], float]] = {
    "no groups": ("", {}, NONE),
    "v2, none set": (V2, {"cpu.max": "max 100000\n", "a/cpu.max": "max 100000\n"}, NONE),
    "v2, half a core": (V2, {"a/b/cpu.max": "50000 100000\n"}, 0.5),
    "v2, a group above": (
        V2,
        {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "300000 100000\n"},
        1.5,
    ),
    "v2, a container's own root": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2, the host's path in a container": (V2, {"cpu.max": "200000 100000\n"}, 2),
    "v2, a path above the root": ("0::/../../x\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2, mounted beside v1": ("0::/a\n", {"unified/a/cpu.max": "100000 50000\n"}, 2),
    "v2, other periods": (V2, {"a/b/cpu.max": "10000 20000\n"}, 0.5),
    "v1": (
        HYBRID,
        {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "75000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "50000"},
        1.5,
    ),
    "v1, none set": (
        HYBRID,
        {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"},
        NONE,
    ),
    "v1, a link to the mount": (
        HYBRID,
        {"cpu/a/cpu.cfs_quota_us": "25000", "cpu/a/cpu.cfs_period_us": "100000"},
        0.25,
    ),
    "v1, a container's own root": (
        "1:cpu:/docker/b3f\n",
        {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"},
        3,
    ),
    "nonsense": (V2, {"cpu.max": "", "a/cpu.max": "x y", "a/b/cpu.max": "1 0"}, NONE),
}


@pytest.mark.parametrize("name", TREES)
def test_the_tightest_quota_on_the_path_counts(name: str, tmp_path: Path) -> None:
    groups, files, cores = TREES[name]
    named = tmp_path / "cgroup"
    named.write_text(groups)
    for path, text in files.items():
        (tmp_path / "fs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / path).write_text(text)
    assert cpu_quota(named, tmp_path / "fs") == cores


def test_elsewhere_than_on_linux_there_is_none(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "nothing", tmp_path / "nothing") == NONE


@pytest.mark.parametrize(
    "quota, affinity, cores",
    [(NONE, 4, 4), (0.5, 4, 1), (1.5, 4, 1), (2.0, 4, 2), (8.0, 4, 4), (0.01, 1, 1)],
)
def test_usable_cores(
    quota: float, affinity: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert environment.usable_cores() == cores


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of version 1 or 2 with a quota of one core, where this user can make one."""
    name = f"rosetrainer_test_{os.getpid()}"
    for mount, settings in (
        ("/sys/fs/cgroup", {"cpu.max": "100000 100000"}),
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}),
    ):
        group = Path(mount) / name
        with contextlib.suppress(OSError):
            group.mkdir()
            if all((group / file).exists() for file in settings):
                for file, value in settings.items():
                    (group / file).write_text(value)
                yield group
                group.rmdir()
                return
            group.rmdir()
    pytest.skip("no control group can be made here")


def test_a_real_group_is_seen(real_group: Path) -> None:
    code = (
        f"import os; open({str(real_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from rosetrainer.environment import usable_cores; print(usable_cores())"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
