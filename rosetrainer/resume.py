"""Where a run begins: anew, or at the newest sound checkpoint of the run that it goes on with."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from rosetrainer.agreement import gather_texts
from rosetrainer.checkpoint_files import clear_drafts
from rosetrainer.config import TrainConfig
from rosetrainer.data import Corpus
from rosetrainer.fields import ConfigError
from rosetrainer.manifest import (
    STEP,
    CheckpointError,
    Manifest,
    check_files,
    checkpoints,
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
    weights_step,
)

DECISIVE = {
    "model": None,
    "optim": {"micro_batch_size"},
    "run": {
        *("data", "out", "eval_every", "eval_tokens", "device", "max_skipped", "checkpoint_every"),
        *("keep", "resume", "async_checkpoint", "timeout", "check_replicas", "threads"),
        *("compile", "profile"),
    },
}
"""The components that decide what a run computes, and their fields that do not."""


@dataclass(frozen=True)
class Beginning:
    """The run folder (None: a new one), and the checkpoints to try, newest first."""

    folder: Path | None
    candidates: tuple[Path, ...] = ()
    given: bool = False
    """The user named the checkpoint: no other one will do."""


def find_beginning(config: TrainConfig, corpus: Corpus) -> Beginning:
    """What --out and --resume ask for. Raises ConfigError if it cannot be had."""
    resume, out = config.run.resume, config.run.out
    if resume not in ("auto", "never"):
        return _from_path(Path(resume), config, corpus)
    if resume == "never":
        check_run_folder(out)
        return Beginning(None)
    if out is None:
        check_run_folder(None)
        return next(_unfinished(config, corpus), Beginning(None))
    if not (out / CONFIG).is_file():
        check_run_folder(out)
        return Beginning(None)
    check_unlocked(out)
    return _go_on(out, config, corpus)


def _unfinished(config: TrainConfig, corpus: Corpus) -> Iterator[Beginning]:
    """The runs of just this command that did not end, newest first."""
    for folder in sorted(RUNS.glob("run-*"), key=lambda run: (len(run.name), run), reverse=True):
        try:
            if weights_step(folder) < config.run.steps and not differences(
                read_config(folder), config
            ):
                check_unlocked(folder)
                yield _go_on(folder, config, corpus)
        except ConfigError:
            continue  # of another version, of other data, or at work


def _go_on(folder: Path, config: TrainConfig, corpus: Corpus) -> Beginning:
    held = read_config(folder)
    _check_same_run(folder, held, config)
    candidates, step = checkpoints(folder), weights_step(folder)
    if not candidates and step == held.run.steps:
        raise ConfigError(
            f"{folder} holds a finished run and no checkpoint to go on from; choose another --out"
        )
    for candidate in candidates:
        try:
            manifest = read_manifest(candidate)
        except CheckpointError:
            continue  # whoever loads it will say so
        _check_fits(candidate, manifest, config, corpus)
        break
    return Beginning(folder, tuple(candidates))


def _from_path(path: Path, config: TrainConfig, corpus: Corpus) -> Beginning:
    """--resume PATH: a checkpoint, or a run folder, whose newest one is meant."""
    is_one = bool(STEP.fullmatch(path.name))
    candidates = (path,) if is_one else tuple(checkpoints(path))
    own = config.run.out or (path.parent if is_one else path)
    if (own / CONFIG).is_file() and read_config(own).run.resume == config.run.resume:
        check_unlocked(own)  # this very command has begun there before
        written = _go_on(own, config, corpus).candidates
        return Beginning(own, written + tuple(one for one in candidates if one not in written))
    if not candidates:
        raise ConfigError(
            f"resume={path} holds no checkpoint; give a run folder or its step_NNNNNN"
        )
    run, manifest = (path.parent if is_one else path), read_manifest(candidates[0])
    _check_same_run(candidates[0], manifest.progress.config, config)
    _check_fits(candidates[0], manifest, config, corpus)
    out = config.run.out
    if out is not None and out.absolute() != run.absolute():
        check_run_folder(out)
        return Beginning(None, candidates[:1], given=True)
    if newer := [one for one in checkpoints(run) if step_of(one) > step_of(candidates[0])]:
        raise ConfigError(
            f"{newer[0]} is newer than {candidates[0]}; give a new --out to branch off, or remove "
            f"what is newer"
        )
    check_unlocked(run)
    return Beginning(run, candidates[:1], given=True)


def differences(held: TrainConfig, wanted: TrainConfig) -> list[str]:
    """What decides the numbers of a run and differs: "seed=1 and not 2", ..."""
    told = []
    for name, free in DECISIVE.items():
        old, new = asdict(getattr(held, name)), asdict(getattr(wanted, name))
        told += [
            f"{key}={new[key]} and not {old[key]}"
            for key in new
            if key not in (free or ()) and old[key] != new[key]
        ]
    return told


def _check_same_run(where: Path, held: TrainConfig, wanted: TrainConfig) -> None:
    """Raises ConfigError unless they compute the same; a run may be given more steps."""
    told = [one for one in differences(held, wanted) if not one.startswith("steps=")]
    if told:
        raise ConfigError(
            f"this run has {', '.join(told)} like {where}; give the same flags to go on with that "
            f"one, or a new --out"
        )


def _check_fits(where: Path, manifest: Manifest, config: TrainConfig, corpus: Corpus) -> None:
    """Raises ConfigError if the run cannot go on from there with this corpus and so few steps."""
    if manifest.progress.step > config.run.steps:
        raise ConfigError(
            f"steps={config.run.steps} is less than the {manifest.progress.step} of {where}; give "
            f"more steps, or a new --out"
        )
    for name, digest in manifest.progress.data.sha256.items():
        if corpus.meta.sha256.get(name) != digest:
            raise ConfigError(
                f"{corpus.folder / name} is not what {where} was trained on; make the same corpus "
                f"again, or give a new --out"
            )


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
        beginning = find_beginning(config, corpus)
        folder = (beginning.folder or new_run_folder(config.run.out)).absolute()
        lock = lock_run(folder)
        clear_drafts(folder)
        candidates = [str(path.absolute()) for path in beginning.candidates]
        told = json.dumps([str(folder), secrets.token_hex(4), candidates, beginning.given])
    name, attempt, paths, given = json.loads(gather_texts(told, world, device)[0])
    if not (Path(name) / LOCK).exists():
        raise ConfigError(
            f"rank {world.rank} does not see {name}; --out has to lie on a disk that all machines "
            f"share"
        )
    found = newest_sound([Path(path) for path in paths], given, world, device)
    checkpoint, manifest = found or (None, None)
    return Place(Path(name), attempt, checkpoint, manifest, lock)


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
            raise CheckpointError(f"{problems[0]}; --resume auto takes the newest sound one")
        if world.rank == 0:
            print(f"{problems[0]}; trying the one before it", flush=True)
    if candidates and weights_step(candidates[0].parent):
        raise CheckpointError(
            f"no checkpoint of {candidates[0].parent} is sound, and it holds weights, which are "
            f"not overwritten; choose another --out"
        )
    if candidates and world.rank == 0:
        print("no checkpoint is sound; beginning at step 1 again", flush=True)
    return None
