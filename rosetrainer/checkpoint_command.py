"""python -m rosetrainer checkpoint ls|verify|export DIR: what there is, if it is whole, and out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tyro.conf import Positional

from rosetrainer.blocks import build_model
from rosetrainer.checkpoint import read_whole
from rosetrainer.durable_files import write_whole
from rosetrainer.fields import ConfigError
from rosetrainer.flags import parse_flags
from rosetrainer.manifest import (
    STEP,
    CheckpointError,
    Manifest,
    check_files,
    checkpoints,
    read_manifest,
)
from rosetrainer.parallel_context import ParallelContext
from rosetrainer.tensor_parallel import shard_spec

USAGE = "python -m rosetrainer checkpoint ls|verify|export DIR"


@dataclass(frozen=True)
class LsCommand:
    """Lists the checkpoints of a run, without reading their tensors."""

    folder: Positional[Path]
    """A run folder, or one checkpoint."""


@dataclass(frozen=True)
class VerifyCommand:
    """Reads every byte, and compares it with what was written. Exit status 1 for damage."""

    folder: Positional[Path]
    """A run folder, or one checkpoint."""


@dataclass(frozen=True)
class ExportCommand:
    """Writes the weights of a checkpoint, whole, as one safetensors file."""

    folder: Positional[Path]
    """A run folder, whose newest checkpoint is meant, or one checkpoint."""
    out: Path
    """The file to write; it must not be there yet."""


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, CheckpointError for a damaged one."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    prog = f"python -m rosetrainer checkpoint {name}"
    if name == "ls":
        return list_them(parse_flags(LsCommand, rest, prog))
    if name == "verify":
        return verify(parse_flags(VerifyCommand, rest, prog))
    if name == "export":
        return export(parse_flags(ExportCommand, rest, prog))
    raise ConfigError(f"usage: {USAGE}")


def list_them(command: LsCommand) -> int:
    print(f"{'checkpoint':16} {'tokens':>15} {'ranks':>6} {'bytes':>17}  of")
    for folder in reversed(found_in(command.folder)):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            print(f"{folder.name:16} damaged: {error}")
            continue
        progress, size = manifest.progress, sum(file.size for file in manifest.files.values())
        print(
            f"{folder.name:16} {progress.tokens_seen:15,} {len(manifest.files):6} {size:17,}  "
            f"{progress.schedule.steps} steps, {progress.dtype}"
        )
    return 0


def verify(command: VerifyCommand) -> int:
    status = 0
    for folder in reversed(found_in(command.folder)):
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
    folder, out = found_in(command.folder)[0], command.out
    if out.exists() or not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out} is there already, or its folder is not; choose another --out")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    tensors = whole_weights(folder, manifest)
    after = {"step": str(manifest.progress.step)}
    write_whole(out, lambda part: save_file(tensors, part, after))
    size = out.stat().st_size
    print(f"{out}: {len(tensors)} tensors of {folder.name}, {size:,} bytes")
    return 0


def whole_weights(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The parameters by name, shaped as nn.Linear would hold them. Raises CheckpointError."""
    shapes_only = ParallelContext(device=torch.device("meta"))
    model = build_model(manifest.progress.config.model, shapes_only)
    weights = {}
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        if name not in manifest.tensors or manifest.tensors[name].shape != spec.shape:
            raise CheckpointError(f"{folder} does not hold {name} as its own config describes it")
        weights[name] = read_whole(folder, manifest, name).reshape(spec.dense_shape)
    return weights


def found_in(folder: Path) -> list[Path]:
    """The checkpoint that folder is, or those in it, newest first. Raises ConfigError if none."""
    found = [folder] if STEP.fullmatch(folder.name) else checkpoints(folder)
    if not found or not folder.exists():
        raise ConfigError(f"{folder} holds no checkpoint; give a run folder, or its step_NNN")
    return found
