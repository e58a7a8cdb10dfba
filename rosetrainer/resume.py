"""Where a run begins: anew, or at the newest sound checkpoint of the run that it goes on with."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from rosetrainer.agreement import gather_texts
from rosetrainer.checkpoint_files import clear_drafts
from rosetrainer.config import TrainConfig
from rosetrainer.data import Corpus
from rosetrainer.fields import ConfigError
from rosetrainer.manifest import (
    CheckpointError,
    Manifest,
    check_files,
    checkpoints,
    found_in,
    read_manifest,
    step_of,
)
from rosetrainer.parallel_context import Axis
from rosetrainer.run_folder import (
    CONFIG,
    LOCK,
    RUNS,
    check_run_folder,
    check_unlocked,
    lock_run,
    new_run_folder,
    read_config,
    read_meta,
    same_place,
)
from rosetrainer.run_identity import (
    began_so,
    check_data,
    check_fits,
    check_same_run,
    differences,
    has_ended,
    newest_readable,
)
from rosetrainer.run_log import LOG

NEW_OUT = "a new --out"
NO_RESUME = "leave --resume out"


@dataclass(frozen=True)
class Beginning:
    """The run folder (None: a new one), and the checkpoints to try, newest first."""

    folder: Path | None
    candidates: tuple[Path, ...] = ()
    given: bool = False
    """The user named the checkpoint: no other one will do."""


def find_beginning(config: TrainConfig, corpus: Corpus) -> Beginning:
    """What --out and --resume ask for. Raises ConfigError if it cannot be had.

    Nothing is written, so that a run that is refused leaves every folder as it was.
    """
    resume, out = config.run.resume, config.run.out
    if resume not in ("auto", "never"):
        return _from_path(Path(resume), config, corpus)
    if out is None:
        check_run_folder(None)
        found = _unfinished(config, corpus) if resume == "auto" else iter(())
        return next(found, Beginning(None))
    if resume == "never" or not (out / CONFIG).exists():
        check_run_folder(out)
        return Beginning(None)
    return _go_on(out, config, corpus)


def _unfinished(config: TrainConfig, corpus: Corpus) -> Iterator[Beginning]:
    """The runs of just this command that did not end, newest first."""
    for folder in sorted(RUNS.glob("run-*"), key=lambda run: (len(run.name), run), reverse=True):
        try:
            if not has_ended(folder, config.run.steps) and not differences(
                read_config(folder), config
            ):
                check_unlocked(folder)
                yield _go_on(folder, config, corpus)
        except ConfigError:
            continue  # of another version, of other data, or at work


def _go_on(folder: Path, config: TrainConfig, corpus: Corpus) -> Beginning:
    """With the run in the folder, which may have no checkpoint yet."""
    try:
        held = read_config(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}; choose another --out") from None
    check_same_run(folder, held, config, NEW_OUT)
    candidates = checkpoints(folder)
    readable = newest_readable(candidates)
    if readable:
        check_fits(*readable, config, corpus, NEW_OUT)
    if meta := read_meta(folder):
        check_data(folder, meta, corpus, NEW_OUT)
    elif not readable and (folder / LOG).exists():
        raise ConfigError(
            f"{folder} has no meta.json that says what it was trained on; choose another --out"
        )
    if not candidates and has_ended(folder, held.run.steps):
        raise ConfigError(
            f"{folder} holds a finished run and no checkpoint to go on from; choose another --out"
        )
    return Beginning(folder, tuple(candidates))


def _from_path(path: Path, config: TrainConfig, corpus: Corpus) -> Beginning:
    """--resume PATH: a checkpoint, or a run folder, whose newest one is meant."""
    candidates = tuple(found_in(path))
    is_one = bool(candidates) and candidates[0].parent != path
    run = candidates[0].parent if is_one else path
    out = config.run.out or run
    if (out / CONFIG).exists() and began_so(out, path):
        written = _go_on(out, config, corpus).candidates
        return Beginning(out, written + tuple(one for one in candidates if one not in written))
    if not candidates:
        raise ConfigError(
            f"resume={path} holds no checkpoint; give a run folder or its step_NNNNNN"
        )
    where, manifest = newest_readable(list(candidates)) or (path, None)
    if manifest:
        check_same_run(where, manifest.progress.config, config, NO_RESUME)
        check_fits(where, manifest, config, corpus, NO_RESUME)
    if not same_place(out, run):
        check_run_folder(out)
        return Beginning(None, candidates, is_one)
    if not (run / CONFIG).exists():
        raise ConfigError(f"{run} has no {CONFIG}: it is no run folder; give a new --out")
    _go_on(run, config, corpus)
    newer = [one for one in checkpoints(run) if step_of(one) > step_of(candidates[0])]
    if newer:
        raise ConfigError(
            f"{newer[0]} is newer than {candidates[0]}; give a new --out to branch off"
        )
    return Beginning(out, candidates, is_one)


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
        candidates = [str(path.absolute()) for path in beginning.candidates]
        told = json.dumps([str(folder), secrets.token_hex(4), candidates, beginning.given])
        if beginning.folder and not candidates:
            print(f"{folder} holds no checkpoint yet; beginning at step 1 again", flush=True)
    name, attempt, paths, given = json.loads(gather_texts(told, world, device)[0])
    if not (Path(name) / LOCK).exists():
        raise ConfigError(
            f"rank {world.rank} does not see {name}; --out has to lie on a disk that all machines "
            f"share"
        )
    found = newest_sound([Path(path) for path in paths], given, world, device)
    if paths and not found:
        raise CheckpointError(
            f"no checkpoint of {Path(paths[0]).parent} is sound; to begin anew give a new --out, "
            f"without --resume"
        )
    checkpoint, manifest = found or (None, None)
    return Place(Path(name), attempt, checkpoint, manifest, lock)


def _claim(config: TrainConfig, corpus: Corpus) -> tuple[Path, Beginning, IO[str]]:
    """The run folder, what is in it, and its lock.

    What is in it is looked at again once it is locked: another start may have come first.
    """
    folder = find_beginning(config, corpus).folder or new_run_folder(config.run.out)
    lock = lock_run(folder)
    try:
        locked = replace(config, run=replace(config.run, out=folder))
        return folder.absolute(), find_beginning(locked, corpus), lock
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
