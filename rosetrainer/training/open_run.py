"""Opens a run: locks its folder, and finds the newest sound checkpoint to resume it from."""

from __future__ import annotations

import json
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    check_files,
    found_in,
    read_manifest,
)
from rosetrainer.checkpoint.run_folder import LOCK, lock_run, new_run_folder
from rosetrainer.checkpoint.slices import clear_drafts
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.parallel.context import Axis
from rosetrainer.training.agreement import gather_texts
from rosetrainer.training.resume_plan import ResumePlan, find_resume_plan
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


def open_run(
    config: TrainConfig, corpus: Corpus, plan: ResumePlan, world: Axis, device: torch.device
) -> RunLocation:
    """Rank 0 locks the run folder; all ranks look for the newest sound checkpoint.

    plan: rank 0's. Raises ConfigError, on rank 0, for what --out and --resume cannot have.
    """
    lock, message = None, ""
    if world.rank == 0:
        folder = plan.folder or new_run_folder(config.run.out)
        lock = lock_run(folder)
    with ExitStack() as on_error:
        if lock:
            on_error.enter_context(lock)
            # What is in it is looked at again now: another start may have come first.
            plan = find_resume_plan(config.with_settings(out=folder), corpus)
            folder = folder.absolute()
            clear_drafts(folder)
            paths = [str(path.absolute()) for path in plan.candidates]
            message = json.dumps([str(folder), secrets.token_hex(4), paths, plan.named])
            if plan.folder and not paths:
                print(f"{folder} holds no checkpoint yet; beginning at step 1 again", flush=True)
        name, attempt, paths, named = json.loads(gather_texts(message, world, device)[0])
        if not (Path(name) / LOCK).exists():
            raise ConfigError(
                f"rank {world.rank} does not see {name}; --out has to lie on a disk that all "
                f"machines share"
            )
        checkpoint = newest_sound([Path(path) for path in paths], named, world, device)
        if paths and not checkpoint:
            raise CheckpointError(
                f"no checkpoint of {Path(paths[0]).parent} is sound; to begin anew give a new "
                f"--out, without --resume"
            )
        on_error.pop_all()
    return RunLocation(Path(name), attempt, checkpoint, lock)


def newest_sound(
    candidates: list[Path], named: bool, world: Axis, device: torch.device
) -> tuple[Path, Manifest] | None:
    """The first candidate of which every byte is as written; the ranks divide the reading.

    Rank 0 prints the damaged ones. Raises CheckpointError if the one that was `named` is damaged.
    """
    for candidate in candidates:
        problem, manifest = "", None
        try:
            manifest = read_manifest(candidate)
            check_files(candidate, manifest, world.rank, world.size)
        except CheckpointError as error:
            problem = str(error)
        problems = [text for text in gather_texts(problem, world, device) if text]
        if not problems and manifest is not None:
            return candidate, manifest
        if named:
            raise CheckpointError(
                f"{problems[0]}; give {candidate.parent} instead, and its newest sound one is taken"
            )
        if world.rank == 0:
            print(f"{problems[0]}; trying the one before it", flush=True)
    return None


def sound_one(path: Path, world: Axis, device: torch.device) -> tuple[Path, Manifest]:
    """The checkpoint that path is, or the newest sound one of the run folder that it is.

    Raises ConfigError if there is none, CheckpointError if none is sound.
    """
    candidates = found_in(path)
    if not candidates:
        raise ConfigError(f"{path} holds no checkpoint; give a run folder, or its step_NNNNNN")
    found = newest_sound(candidates, candidates[0].parent != path, world, device)
    if found is None:
        raise CheckpointError(f"no checkpoint of {path} is sound; give another run")
    return found
