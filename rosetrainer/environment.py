"""What this process was started with: its place among the ranks, its GPU, its cores, its Python."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rosetrainer.cgroup import cpu_quota
from rosetrainer.validation import ConfigError

if TYPE_CHECKING:
    import torch

BY_ITSELF = "torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE by itself"

LAUNCHED = "ROSETRAINER_LAUNCHED"
"""Environment variable that our launcher gives its ranks: the launcher's process id."""

SCRIPT = "rosetrainer"
"""The command that `pip install` of this package makes."""

ANSWER_SECONDS = 5.0
"""For `python` on PATH to say what it is; one that says nothing is not ours."""


class PlaceError(ConfigError):
    """A launcher's variables are wrong: reported by each rank that has them, maybe one alone."""


@dataclass(frozen=True)
class Place:
    """A process's place among the ranks, by what its launcher set; None where that says nothing."""

    rank: int
    world_size: int
    local_rank: int | None = None
    local_world_size: int | None = None


def world_from_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) by torchrun, mpirun or srun.

    (0, 1, 0, 1) alone, and 0 and 1 for the last two where nothing says which ranks share a machine.
    Raises PlaceError for variables that are no numbers, lack their partner or contradict it.
    """
    place = _of_torchrun() or _of_mpirun() or _of_srun() or Place(0, 1)
    rank, world_size = place.rank, place.world_size
    local_rank, local_world_size = _on_this_machine(place) or (0, 1)
    if rank >= world_size:
        raise PlaceError(f"RANK={rank} must be below WORLD_SIZE={world_size}; {BY_ITSELF}")
    if not local_rank < local_world_size <= world_size:
        raise PlaceError(
            f"LOCAL_RANK={local_rank} must be below LOCAL_WORLD_SIZE={local_world_size}, and that "
            f"at most WORLD_SIZE={world_size}; {BY_ITSELF}"
        )
    return rank, world_size, local_rank, local_world_size


def is_rank() -> bool:
    """Whether a launcher, ours or another, has started this process as a rank."""
    return "RANK" in os.environ or world_from_environment()[1] > 1


def reports_for_machine() -> bool:
    """Whether this rank is the one of its machine that reports an error which all of them have."""
    try:
        return world_from_environment()[2] == 0
    except ConfigError:
        return os.environ.get("LOCAL_RANK", "0") == "0"


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise PlaceError(f"the environment's {name}={text!r} should be a number; use torchrun")
    return None if text is None else int(text)


def _of_torchrun() -> Place | None:
    """By the variables that torchrun sets, and whoever starts ranks in its manner."""
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        has, lacks = ("RANK", "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", "RANK")
        raise PlaceError(f"{has}={os.environ[has]} is set and {lacks} is not; {BY_ITSELF}")
    return Place(rank, world_size)


def _of_mpirun() -> Place | None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    rank, world_size, *local = (_number(f"OMPI_COMM_WORLD_{name}") for name in names)
    return None if rank is None or world_size is None else Place(rank, world_size, *local)


def _of_srun() -> Place | None:
    """None in a batch script: Slurm's variables are there, but srun has not started it."""
    rank, world_size = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS")
    if world_size is None and (rank or "SLURM_STEP_ID" in os.environ):
        world_size = _number("SLURM_NTASKS")
    if rank is None or world_size is None:
        return None
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    of_nodes: list[int] = []  # "2(x3),1" is 2, 2, 2, 1
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks or str(world_size)):
        of_nodes += [int(count)] * int(times or 1)
    node = _number("SLURM_NODEID") or 0
    here = of_nodes[node] if node < len(of_nodes) else None
    return Place(rank, world_size, _number("SLURM_LOCALID"), here)


def _on_this_machine(place: Place) -> tuple[int, int] | None:
    """(local rank, local world size); None where nothing tells them.

    Scripts that set RANK from Slurm's variables often leave these two out.
    """
    local_rank, local_world_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    if place.world_size == 1:
        return local_rank or 0, local_world_size or 1
    for other in filter(None, (_of_mpirun(), _of_srun())):
        if (other.rank, other.world_size) == (place.rank, place.world_size):
            local_rank = other.local_rank if local_rank is None else local_rank
            if local_world_size is None:
                local_world_size = other.local_world_size
    if local_rank is None and local_world_size is None:
        return None
    if local_rank is None or local_world_size is None:
        has, lacks = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        if local_rank is None:
            has, lacks = lacks, has
        raise PlaceError(f"{has} is known and {lacks} is not; {BY_ITSELF}")
    return local_rank, local_world_size


def choose_device(wanted: str) -> torch.device:
    """The device of this rank: CUDA when each local rank has a GPU of its own.

    Raises ConfigError if `wanted` is "cuda" and there are too few, and where nothing tells which of
    several GPUs is this rank's.
    """
    import torch  # late: the launcher, which needs no torch, saves the seconds of importing it

    _, _, local_rank, local_world_size = world_from_environment()
    gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if gpus and gpus_are_own(gpus, local_world_size):
        return torch.device("cuda", 0)
    place = _of_torchrun()
    if gpus > 1 and place and place.world_size > 1 and _on_this_machine(place) is None:
        raise ConfigError(
            f"RANK={place.rank} and WORLD_SIZE={place.world_size} do not tell which of the {gpus} "
            f"GPUs is this rank's; set LOCAL_RANK and LOCAL_WORLD_SIZE too, or use --device cpu"
        )
    if gpus >= local_world_size:
        return torch.device("cuda", local_rank)
    if wanted == "cuda":
        raise ConfigError(
            f"device=cuda needs a GPU for each of the {local_world_size} local ranks, here are "
            f"{gpus}; start {gpus} ranks or use --device cpu"
            if gpus
            else "device=cuda, but torch finds no GPU here; use --device cpu"
        )
    return torch.device("cpu")


def gpus_are_own(visible: int, local_world_size: int) -> bool:
    """Whether GPUs fewer than local ranks are for this rank alone, by what a scheduler has set.

    torchrun and our launcher give all ranks one environment, so these share what they see.
    """
    started_alike = {"TORCHELASTIC_RUN_ID", LAUNCHED} & set(os.environ)
    if visible >= local_world_size or started_alike:
        return False
    per_task = f"gpu:{os.environ.get('SLURM_GPUS_PER_TASK', '')},"  # "2", or "a100:2"
    per_task += os.environ.get("SLURM_TRES_PER_TASK", "")  # "cpu=4,gres/gpu=2"
    if found := re.search(r"gpu(?:[:=][^,]*)?[:=](\d+)(?:,|$)", per_task):
        return visible == int(found[1])
    of_node = _number("SLURM_GPUS_ON_NODE")
    if of_node is not None:  # there are enough, and this task is shown a part of them
        return of_node >= local_world_size
    return visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ


def name_ranks(ranks: list[int]) -> str:
    """rank 1 has; ranks 1, 2 and 5 have"""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last} have" if first else f"rank {last} has"


def usable_cores() -> int:
    """Cores that this process may keep busy: by its affinity and its control group's CPU quota.

    A quota is rounded down, to 1 at least: once it is used up all threads stand still until the
    next period, and so do the ranks that wait for them.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, int(min(cpu_quota(), cores)))


def python_command() -> str:
    """How a user here starts this very Python, as a shell reads it: for the commands we print."""
    relative = os.path.relpath(sys.executable)
    if not relative.startswith(os.pardir):
        # A bare name would be looked for on PATH.
        return shlex.quote(relative if os.sep in relative else os.path.join(os.curdir, relative))
    on_path = shutil.which("python")
    return "python" if on_path and _is_this_python(on_path) else shlex.quote(sys.executable)


def _is_this_python(path: str) -> bool:
    """Whether what it starts has our packages.

    It is asked: one file can be the Python of many environments, and a shim is none by itself.
    """
    here = ascii((os.path.realpath(sys.prefix), sys.version)).encode()
    show = "import os, sys; print(ascii((os.path.realpath(sys.prefix), sys.version)))"
    try:
        answer = subprocess.run(
            [path, "-I", "-c", show],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.splitlines()[-1:] == [here]


def prepare_command() -> str:
    """How a user here makes a corpus, but for the source and its flags."""
    return f"{trainer_command()} prepare"


def trainer_command() -> str:
    """How a user here starts a command of ours: as this process was started."""
    started = sys.argv[0]
    if os.path.basename(started) != SCRIPT:
        return f"{python_command()} -m rosetrainer"
    on_path = shutil.which(SCRIPT)
    return SCRIPT if on_path and os.path.samefile(on_path, started) else shlex.quote(started)
