"""A run takes its folder, and the newest sound checkpoint of what it goes on with."""

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
from rosetrainer.training.open_run import Beginning, find_beginning
from rosetrainer.validation import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a run writes, and what it goes on from; the same on every rank but for the lock."""

    folder: Path
    attempt: str
    """A word that no other process has used for this folder."""
    checkpoint: Path | None
    manifest: Manifest | None
    lock: IO[str] | None
    """Held by rank 0 while it lives."""


def begin(config: TrainConfig, corpus: Corpus, world: Axis, device: torch.device) -> Place:
    """Rank 0 finds and locks the run folder; all ranks look for the newest sound checkpoint.

    Raises ConfigError, on rank 0, for what --out and --resume cannot have.
    """
    lock, told = None, ""
    if world.rank == 0:
        folder, beginning, lock = _claim(config, corpus)
        clear_drafts(folder)
        paths = [str(path.absolute()) for path in beginning.candidates]
        told = json.dumps([str(folder), secrets.token_hex(4), paths, beginning.given])
        if beginning.folder and not paths:
            print(f"{folder} holds no checkpoint yet; beginning at step 1 again", flush=True)
    name, attempt, paths, given = json.loads(gather_texts(told, world, device)[0])
    if not (Path(name) / LOCK).exists():
        raise ConfigError(
            f"rank {world.rank} does not see {name}; --out has to lie on a disk that all machines "
            f"share"
        )
    with ExitStack() as on_error:
        if lock:
            on_error.enter_context(lock)
        found = newest_sound([Path(path) for path in paths], given, world, device)
        if paths and not found:
            raise CheckpointError(
                f"no checkpoint of {Path(paths[0]).parent} is sound; to begin anew give a new "
                f"--out, without --resume"
            )
        on_error.pop_all()
    checkpoint, manifest = found or (None, None)
    return Place(Path(name), attempt, checkpoint, manifest, lock)


def _claim(config: TrainConfig, corpus: Corpus) -> tuple[Path, Beginning, IO[str]]:
    """The run folder, what is in it, and its lock.

    What is in it is looked at again once it is locked: another start may have come first.
    """
    folder = find_beginning(config, corpus).folder or new_run_folder(config.run.out)
    lock = lock_run(folder)
    try:
        return folder.absolute(), find_beginning(config.with_settings(out=folder), corpus), lock
    except BaseException:
        lock.close()
        raise


def newest_sound(
    candidates: list[Path], given: bool, world: Axis, device: torch.device
) -> tuple[Path, Manifest] | None:
    """The first candidate of which every byte is as written; the ranks share the reading.

    Rank 0 names the damaged ones. Raises CheckpointError if the one that was `given` is damaged.
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
        if given:
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
