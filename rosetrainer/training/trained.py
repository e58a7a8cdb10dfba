"""What training has left: the newest sound checkpoint of a run, and its model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    check_files,
    checkpoints_in,
    read_manifest,
)
from rosetrainer.checkpoint.saver import load_parameters
from rosetrainer.config import GPTConfig
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import Axis, ParallelContext
from rosetrainer.training.agreement import gather_texts, world_axis


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
    candidates = checkpoints_in(path)
    found = newest_sound(candidates, candidates[0].parent != path, world, device)
    if found is None:
        raise CheckpointError(f"no checkpoint of {path} is sound; give another run")
    return found


def load_model(path: Path, config: GPTConfig, context: ParallelContext) -> GPTModel:
    """The model of a run or checkpoint, of which each rank reads and holds its own slices alone.

    Raises ConfigError if there is no sound checkpoint, or it is of another model.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be for the model's text
        folder, manifest = sound_one(path, world_axis(), context.device)
    model = build_model(config, context)
    if manifest.progress.dtype == "float64":
        model.double()
    load_parameters(folder, manifest, model)
    return model
