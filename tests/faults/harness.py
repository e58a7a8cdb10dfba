"""Training runs whose ranks meet with real faults, and what is left of them.

Ranks are forked from a process that has torch loaded, and are what torchrun would start: they run
the command line, write to files of their own, and end with an exit status. A fault happens on one
rank, at one step, in one phase.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from ranks import FORKSERVER, LONGEST_SECONDS

CHAOS = bool(os.environ.get("CHAOS"))
"""`make chaos`: every trial of the matrix; otherwise a few of each."""

GRACE_SECONDS = 60.0
"""For ranks to end by themselves after one has failed; a hung one is killed at once."""

STEPS = 8
SHAPE = [
    "--context-length",
    "16",
    "--n-layers",
    "1",
    "--n-heads",
    "2",
    "--d-model",
    "16",
    "--dropout",
    "0.1",
]
SCHEDULE = f"--steps {STEPS} --warmup-steps 2 --eval-every 4 --eval-tokens 256".split()
SAVES = [
    "--checkpoint-every",
    "2",
    "--global-batch-size",
    "8",
    "--dtype",
    "float32",
    "--threads",
    "1",
]
FLAGS = [*SHAPE, *SCHEDULE, *SAVES]

STOPPED = (None, 0, 130)
"""A rank that has not failed: it runs, or has ended, or Ctrl-C has stopped it, as the others."""

STRUCK = "struck"
"""The file with the time at which a fault happened, by the monotonic clock."""

Act = Callable[..., object]

POINTS = {
    # phase: (module, function, before or after it, or in the middle of its file)
    "start": ("training.setup", "init_process_group", "before"),
    "layout": ("training.setup", "init_parallel", "before"),
    "describe": ("checkpoint.run_folder", "write_whole", "before"),
    "log": ("training.setup", "RunLog", "before"),
    "batch": ("training.trainer", "micro_batches", "after"),
    "forward": ("training.step", "accumulate_gradients", "before"),
    "backward": ("training.step", "check_gradients", "before"),
    "reduce": ("training.step", "reduce_gradients", "before"),
    "clip": ("training.trainer", "clip_gradients", "before"),
    "updated": ("training.trainer", "train_step", "after"),
    "evaluation": ("training.trainer", "evaluate", "before"),
    # Inside an action of a pipeline.
    "stage forward": ("parallel.pipeline.runner._Run", "forward", "before"),
    "stage backward": ("parallel.pipeline.runner._Run", "backward", "before"),
    "stage weights": ("parallel.pipeline.runner._Run", "make_weight_gradients", "before"),
    # Inside a save.
    "mid-shard": ("checkpoint.slices", "save_file", "half"),
    "shard": ("checkpoint.slices", "sha256_of", "before"),
    "manifest": ("checkpoint.slices", "with_own_hash", "before"),
    "rename": ("checkpoint.slices.Draft", "name_whole", "before"),
    "renamed": ("checkpoint.slices.Draft", "name_whole", "after"),
    "retention": ("checkpoint.saver", "retain", "before"),
    "removal": ("checkpoint.slices.shutil", "rmtree", "before"),
}
TRAINING = ("batch", "forward", "backward", "reduce", "clip", "updated")
BEGINNING = ("start", "layout", "describe", "log")
SAVING = ("mid-shard", "shard", "manifest", "rename", "renamed", "retention", "removal")
OF_RANK_0 = (*("describe", "log"), *("manifest", "rename", "renamed", "retention", "removal"))


@dataclass(frozen=True)
class Fault:
    """`act` happens on `rank` in the first `phase` of `step`, counted from 1; 0: before any.

    It is given the arguments of the function that stands for the phase, see POINTS.
    """

    rank: int
    step: int
    phase: str
    act: Act

    def install(self, current: dict[str, int], note: Path) -> None:
        """note: the file for the time at which it happens."""
        path, name, when = POINTS[self.phase]
        holder = resolve_name(f"rosetrainer.{path}")
        original = getattr(holder, name)

        def changed(*args: Any, **kwargs: Any) -> Any:
            if when == "after":
                result = original(*args, **kwargs)
                self.strike(current, args, note)
                return result
            if when == "half" and current["step"] == self.step:  # the file is begun
                Path(args[1]).write_bytes(b"half a shard")
            self.strike(current, args, note)
            return original(*args, **kwargs)

        setattr(holder, name, changed)

    def strike(self, current: dict[str, int], arguments: Sequence[Any], note: Path) -> None:
        if current["step"] == self.step and "struck" not in current:
            current["struck"] = 1
            note.write_text(str(time.monotonic()))
            self.act(*arguments)


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_on(*_: object) -> None:
    while True:
        time.sleep(3600)


HANGS = (freeze, sleep_on)


@dataclass
class Outcome:
    """What the ranks of one launch left: statuses as subprocess has them, and what they said."""

    statuses: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float
    before_fault: float
    """Seconds from the start to the fault, of all of them if there is none: this machine's pace."""

    @property
    def after_fault(self) -> float:
        """Seconds from the fault to the end."""
        return self.seconds - self.before_fault

    @property
    def refused(self) -> bool:
        """Ended by a user's mistake. A rank that is told to end before it trains ends with 0."""
        return 2 in self.statuses and set(self.statuses) <= {0, 2}

    @property
    def said(self) -> str:
        return "".join(self.outputs)

    @property
    def complained(self) -> str:
        return "".join(self.errors)


@dataclass
class Launch:
    """Ranks under way."""

    folder: tempfile.TemporaryDirectory[str]
    processes: list[Any]
    hanging: set[int]
    """Ranks whose fault is to hang: nothing but a kill ends them."""
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> Outcome:
        """Their end. If one fails, the others are told to end, and killed if they do not."""
        failed_at = 0.0
        deadline = self.started + LONGEST_SECONDS
        while running := {rank for rank, p in enumerate(self.processes) if p.exitcode is None}:
            now = time.monotonic()
            if not failed_at and any(p.exitcode not in STOPPED for p in self.processes):
                failed_at = now
                self.send(signal.SIGTERM)
            late = now > deadline or (failed_at and now > failed_at + GRACE_SECONDS)
            if late or running <= self.hanging:
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        ended = time.monotonic()
        place = Path(self.folder.name)
        outputs, errors = (
            [(place / f"{stream}{rank}").read_text() for rank in range(len(self.processes))]
            for stream in ("out", "err")
        )
        note = place / STRUCK
        struck = float(note.read_text()) if note.exists() else ended
        self.folder.cleanup()
        statuses = [p.exitcode for p in self.processes]
        seconds = ended - self.started
        return Outcome(statuses, outputs, errors, seconds, struck - self.started)

    def send(self, signum: int, ranks: Sequence[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if process.exitcode is None and (ranks is None or rank in ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signum)

    @property
    def ready(self) -> bool:
        """Whether all ranks listen to signals, as they do from the start of their real life."""
        place = Path(self.folder.name)
        return all((place / f"ready{rank}").exists() for rank in range(len(self.processes)))

    @property
    def struck(self) -> bool:
        """Whether the fault has happened."""
        return Path(self.folder.name, STRUCK).exists()

    @property
    def said_so_far(self) -> str:
        """By rank 0."""
        path = Path(self.folder.name, "out0")
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + LONGEST_SECONDS
        while not condition():
            assert time.monotonic() < end, "it never came to be so"
            assert any(p.exitcode is None for p in self.processes), "all ranks have ended"
            time.sleep(0.002)


def launch(
    n_ranks: int,
    flags: Sequence[str],
    *faults: Fault,
    of_rank: dict[int, list[str]] | None = None,
    prepare: Callable[[int], None] | None = None,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    hangs: Sequence[int] = (),
) -> Launch:
    """Starts `python -m rosetrainer train flags...` as n_ranks ranks.

    of_rank: more flags of one rank. prepare(rank) runs in each rank first.
    hangs: ranks that hang without a fault of HANGS.
    """
    folder = tempfile.TemporaryDirectory(prefix="faults_")
    processes = []
    for rank in range(n_ranks):
        own = [*flags, *(of_rank or {}).get(rank, [])]
        mine = [fault for fault in faults if fault.rank == rank]
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            "ROSETRAINER_RENDEZVOUS_DIR": folder.name,
        } | (environment or {})
        target = (folder.name, rank, own, mine, prepare, variables, cwd)
        process = FORKSERVER.Process(target=_rank_main, args=target)
        process.start()
        processes.append(process)
    hanging = {fault.rank for fault in faults if fault.act in HANGS}.union(hangs)
    return Launch(folder, processes, hanging)


def run(n_ranks: int, flags: Sequence[str], *faults: Fault, **more: Any) -> Outcome:
    return launch(n_ranks, flags, *faults, **more).wait()


def _rank_main(
    folder: str,
    rank: int,
    argv: list[str],
    faults: list[Fault],
    prepare: Callable[[int], None] | None,
    environment: dict[str, str],
    cwd: Path | None,
) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        target = os.open(f"{folder}/{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(cwd or folder)
    warnings.simplefilter("error")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    from rosetrainer.__main__ import start
    from rosetrainer.launch.rank import STOP

    STOP.listen()
    Path(folder, f"ready{rank}").touch()
    current = {"step": 0}
    note_losses(current, rank)
    measures_nothing = lambda *_: 1e9  # noqa: E731
    vars(import_module("rosetrainer.training.setup"))["matmul_peak"] = measures_nothing  # 0.3 s
    for fault in faults:
        fault.install(current, Path(folder, STRUCK))
    if prepare:
        prepare(rank)
    start(["train", *argv])


def note_losses(current: dict[str, int], rank: int) -> None:
    """Keeps the step that is under way, and writes each loss, exact, beside the run's log."""
    loop = import_module("rosetrainer.training.trainer")
    original = loop.train_step

    def train_step(config: Any, *args: Any) -> dict[str, float]:
        current["step"] = args[-1] + 1
        figures: dict[str, float] = original(config, *args)
        if rank == 0 and config.run.out:
            with Path(f"{config.run.out}.losses").open("a") as file:
                file.write(f"{current['step']} {figures['train/loss'].hex()}\n")
        return figures

    vars(loop)["train_step"] = train_step


def losses(out: Path) -> dict[int, str]:
    """The exact loss of each step, the one that was computed last."""
    lines = Path(f"{out}.losses").read_text().splitlines()
    return {int(step): loss for step, loss in (line.split() for line in lines)}


def state(folder: Path) -> dict[str, bytes]:
    """All that a checkpoint holds, whole: parameters and moments, bit for bit."""
    from rosetrainer.checkpoint.manifest import check_files, read_manifest
    from rosetrainer.checkpoint.saver import read_whole

    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return {name: read_whole(folder, manifest, name).numpy().tobytes() for name in manifest.tensors}


def contents(out: Path) -> dict[str, bytes]:
    """Every byte of a run folder but for the lock, by path."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Finished:
    """A run that nothing interrupted: what every other one has to come to."""

    losses: dict[int, str]
    state: dict[str, bytes]

    @classmethod
    def of(cls, out: Path) -> Finished:
        return cls(losses(out), state(out / f"step_{STEPS:06d}"))
