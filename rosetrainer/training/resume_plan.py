"""What --out and --resume ask for: a run folder, and the checkpoints to resume it from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from rosetrainer.checkpoint.manifest import checkpoints, checkpoints_in, found_in, step_of
from rosetrainer.checkpoint.run_folder import (
    CONFIG,
    RUNS,
    check_run_folder,
    check_unlocked,
    read_config,
    read_meta,
    same_place,
)
from rosetrainer.checkpoint.slices import VISIBLE, Marks, marks_of
from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.reporting.run_log import LOG
from rosetrainer.training.run_identity import (
    came_to,
    check_data,
    check_fits,
    check_same_run,
    differences,
    has_ended,
    newest_readable,
    was_resumed_from,
)
from rosetrainer.validation import ConfigError

NEW_OUT = "a new --out"
NO_RESUME = "leave --resume out"


@dataclass(frozen=True)
class ResumePlan:
    """The run folder (None: a new one), and the checkpoints to try, newest first."""

    folder: Path | None = None
    candidates: tuple[Path, ...] = ()
    named: bool = False
    """The user named the checkpoint, so that no other one will do."""
    came_to: tuple[str, str] = ("", "")
    """Of run_identity: what the resumed run computes in and with."""
    seen: Marks = field(default_factory=dict)
    """What lay in the run folder, or in --out, before any of it was read."""


def find_resume_plan(config: TrainConfig, corpus: Corpus) -> ResumePlan:
    """Raises ConfigError if what --out and --resume ask for is not possible.

    Writes nothing, so that a run that is refused leaves every folder as it was.
    """
    resume, out = config.checkpoint.resume, config.run.out
    if resume not in ("auto", "never"):
        return _from_path(Path(resume), config, corpus)
    seen = marks_of(out, VISIBLE) if out else {}
    if out is None:
        check_run_folder(None)
        found = _unfinished(config, corpus) if resume == "auto" else iter(())
        return next(found, ResumePlan())
    if resume == "never" or not os.path.lexists(out / CONFIG):
        check_run_folder(out)
        return ResumePlan(seen=seen)
    return _resume(out, config, corpus)


def _unfinished(config: TrainConfig, corpus: Corpus) -> Iterator[ResumePlan]:
    """The unfinished runs of this very command, newest first."""
    for folder in sorted(RUNS.glob("run-*"), key=lambda run: (len(run.name), run), reverse=True):
        try:
            saved = read_config(folder)
            given = config.precision.dtype == "auto" and saved.precision.dtype != "auto"
            if given or has_ended(folder, config.run.steps) or differences(saved, config):
                continue  # of another command, or finished
            check_unlocked(folder)
            yield _resume(folder, config, corpus)
        except ConfigError:
            continue  # of another version or other data, or in use


def _resume(
    folder: Path, config: TrainConfig, corpus: Corpus, more: tuple[Path, ...] = ()
) -> ResumePlan:
    """The run in the folder, which may have no checkpoint of its own yet, but `more` elsewhere."""
    seen = marks_of(folder, VISIBLE)
    try:
        saved = read_config(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}; choose another --out") from None
    check_same_run(folder, saved, config, NEW_OUT)
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
    if not candidates and has_ended(folder, saved.run.steps):
        raise ConfigError(
            f"{folder} holds a finished run and no checkpoint to go on from; choose another --out"
        )
    origin = saved.checkpoint.resume
    if not (candidates or more or origin in ("auto", "never")):
        raise ConfigError(
            f"{folder} went on from {origin} and holds no checkpoint of its own; add --resume "
            f"{quote(origin)}, or choose another --out"
        )
    candidates += [one for one in more if one not in candidates]
    return ResumePlan(folder, tuple(candidates), came_to=came_to(saved), seen=seen)


def _from_path(path: Path, config: TrainConfig, corpus: Corpus) -> ResumePlan:
    """--resume PATH: a checkpoint, or a run folder, whose newest one is meant."""
    candidates = tuple(found_in(path))
    is_one = bool(candidates) and candidates[0].parent != path
    run = candidates[0].parent if is_one else path
    out = config.run.out or run
    seen = marks_of(out, VISIBLE)
    branched = os.path.lexists(out / CONFIG) and was_resumed_from(out, path)
    if branched and (candidates or checkpoints(out)):
        return _resume(out, config, corpus, candidates)
    checkpoints_in(path)
    where, manifest = newest_readable(list(candidates)) or (path, None)
    before = came_to(manifest.progress.config) if manifest else ("", "")
    if manifest:
        check_same_run(where, manifest.progress.config, config, NO_RESUME)
        check_fits(where, manifest, config, corpus, NO_RESUME)
    if not same_place(out, run):
        check_run_folder(out)
        return ResumePlan(None, candidates, is_one, before, seen)
    if not os.path.lexists(run / CONFIG):
        raise ConfigError(f"{run} has no {CONFIG}: it is no run folder; give a new --out")
    _resume(run, config, corpus)
    newer = [one for one in checkpoints(run) if step_of(one) > step_of(candidates[0])]
    if newer:
        raise ConfigError(
            f"{newer[0]} is newer than {candidates[0]}; give a new --out to branch off"
        )
    return ResumePlan(out, candidates, is_one, before, seen)
