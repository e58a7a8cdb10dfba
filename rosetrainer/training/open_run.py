"""Opens a run: locks its folder, and finds the newest sound checkpoint to resume it from."""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from rosetrainer.checkpoint.manifest import CheckpointError, Manifest
from rosetrainer.checkpoint.run_folder import LOCK, lock_run, new_run_folder
from rosetrainer.checkpoint.slices import VISIBLE, clear_drafts, marks_of
from rosetrainer.parallel.context import Axis
from rosetrainer.training.agreement import gather_texts
from rosetrainer.training.resume_plan import ResumePlan
from rosetrainer.training.trained import newest_sound
from rosetrainer.validation import ConfigError


@dataclass(frozen=True)
class RunLocation:
    """Where a run writes, and what it is resumed from; the same on every rank but for the lock."""

    folder: Path
    attempt: str
    """A name that no other process has used for this folder."""
    checkpoint: tuple[Path, Manifest] | None
    lock: IO[str] | None
    """Held by rank 0 while it is open."""


def open_run(out: Path | None, plan: ResumePlan, world: Axis, device: torch.device) -> RunLocation:
    """Rank 0 locks the run folder; all ranks look for the newest sound checkpoint.

    out: of a new run. plan: rank 0's. Raises ConfigError, on rank 0, if the folder cannot be had.
    """
    lock, message = None, ""
    if world.rank == 0:
        folder = plan.folder or new_run_folder(out)
        lock = lock_run(folder)
    with ExitStack() as on_error:
        if lock:
            on_error.enter_context(lock)
            if marks_of(folder, VISIBLE) != plan.seen:
                raise ConfigError(
                    f"another start has written to {folder} since this one looked into it; give "
                    f"the same command again"
                )
            folder = folder.absolute()
            clear_drafts(folder)
            paths = [str(path.absolute()) for path in plan.candidates]
            attempt = secrets.token_hex(4)
            print(attempt, file=lock, flush=True)
            os.fsync(lock.fileno())  # the other machines look for it
            message = json.dumps([str(folder), attempt, paths, plan.named])
            if plan.folder and not paths:
                print(f"{folder} holds no checkpoint yet; beginning at step 1 again", flush=True)
        name, attempt, paths, named = json.loads(gather_texts(message, world, device)[0])
        seen, problem = Path(name) / LOCK, ""
        if not seen.exists() or attempt not in seen.read_text():  # of each machine's own disk
            problem = (
                f"rank {world.rank} on {socket.gethostname()} does not see {name} as rank 0 has "
                f"it; --out has to lie on a disk that all machines share"
            )
        for told in filter(None, gather_texts(problem, world, device)):
            raise ConfigError(told)
        checkpoint = newest_sound([Path(path) for path in paths], named, world, device)
        if paths and not checkpoint:
            raise CheckpointError(
                f"no checkpoint of {Path(paths[0]).parent} is sound; to begin anew give a new "
                f"--out, without --resume"
            )
        on_error.pop_all()
    return RunLocation(Path(name), attempt, checkpoint, lock)
