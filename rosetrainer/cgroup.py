"""The share of a machine's cores that a container or a scheduler allows this process (Linux)."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path


def cpu_quota(
    cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """Cores by the tightest CPU quota of this process's control group and those that hold it.

    infinity where there is none. cgroup: the file that names the groups; root: where the
    hierarchies of version 2 (cpu.max) and version 1 (cpu.cfs_quota_us) are mounted.
    """
    lines = cgroup.read_text().splitlines() if cgroup.is_file() else []
    quotas = [math.inf]
    for line in lines:  # number:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        # Inside a container the root may be the group itself, and the path one of the host's: what
        # is not there has no quota to be read.
        names = [name for name in path.split("/") if name not in ("", "..")]
        groups = [names[:depth] for depth in range(len(names) + 1)]
        quotas += [_quota(mount.joinpath(*group)) for mount in mounts for group in groups]
    return min(quotas)


def _quota(folder: Path) -> float:
    """Cores that the group in this folder may use; infinity where it says nothing."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" without one
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()  # -1 without one
            period = (folder / "cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            return int(quota) / int(period)
    return math.inf
