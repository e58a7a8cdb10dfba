"""python -m rosetrainer checkpoint ls|verify|export DIR: lists, verifies or exports checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from rosetrainer.checkpoint.export import whole_layers, write_weights
from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    check_files,
    checkpoints_in,
    read_manifest,
)
from rosetrainer.commands.flags import parse_subcommand
from rosetrainer.durable_files import room, write_whole
from rosetrainer.parallel.context import Axis
from rosetrainer.training.trained import sound_one
from rosetrainer.validation import POSITIONAL, ConfigError, one_line


@dataclass(frozen=True)
class LsCommand:
    """Lists the checkpoints of a run, without reading their tensors."""

    folder: Annotated[Path, POSITIONAL]
    """A run folder, or one checkpoint."""


@dataclass(frozen=True)
class VerifyCommand:
    """Reads every byte, and compares it with what was written. Exit status 1 for damage."""

    folder: Annotated[Path, POSITIONAL]
    """A run folder, or one checkpoint."""


@dataclass(frozen=True)
class ExportCommand:
    """Writes the weights of a checkpoint, whole, as one safetensors file."""

    folder: Annotated[Path, POSITIONAL]
    """A run folder, whose newest sound checkpoint is meant, or one checkpoint."""
    out: Path
    """The file to write; it must not be there yet."""


COMMANDS = {"ls": LsCommand, "verify": VerifyCommand, "export": ExportCommand}


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, CheckpointError for a damaged one."""
    command = parse_subcommand(COMMANDS, argv, "python -m rosetrainer checkpoint")
    acts: dict[Any, Any] = {LsCommand: list_them, VerifyCommand: verify, ExportCommand: export}
    return int(acts[type(command)](command))


def list_them(command: LsCommand) -> int:
    found = checkpoints_in(command.folder)
    print(f"{'checkpoint':16} {'tokens':>15} {'ranks':>6} {'bytes':>17}  of")
    for folder in reversed(found):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            print(f"{folder.name:16} damaged: {error}")
            continue
        progress, size = manifest.progress, sum(file.size for file in manifest.files.values())
        print(
            f"{folder.name:16} {progress.tokens_seen:15,} {len(manifest.files):6} {size:17,}  "
            f"{progress.config.run.steps} steps, {progress.dtype}"
        )
    return 0


def verify(command: VerifyCommand) -> int:
    status = 0
    for folder in reversed(checkpoints_in(command.folder)):
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest)
        except CheckpointError as error:
            print(f"{folder.name}: damaged: {error}")
            status = 1
        else:
            size = sum(file.size for file in manifest.files.values())
            print(f"{folder.name}: sound, {len(manifest.files)} files, {size:,} bytes as written")
    return status


def export(command: ExportCommand) -> int:
    out = command.out
    if os.path.lexists(out) or not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out} is there already, or its folder is not; choose another --out")
    folder, manifest = sound_one(command.folder, Axis("world"), torch.device("cpu"))
    layers = whole_layers(folder, manifest)
    has = room(out.absolute().parent)
    with one_line(f"cannot write {out}", f"{has} bytes can be written there; choose another --out"):
        write_whole(out, lambda part: write_weights(part, folder, manifest, layers))
    size = out.stat().st_size
    print(f"{out}: {len(layers)} tensors of {folder.name}, {size:,} bytes")
    return 0
