"""A checkpoint's manifest, read and checked before anything in it is used.

A manifest names every file of its folder with size and SHA-256, every tensor with its slices, and
where the run stands; it holds its own SHA-256. It is JSON: nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rosetrainer.config import TrainConfig
from rosetrainer.durable_files import sha256_of, short
from rosetrainer.validation import (
    Bounds,
    ConfigError,
    CountOrZero,
    config_from_dict,
)

MANIFEST = "manifest.json"
FORMAT = 3
LARGEST_MANIFEST = 2**28  # bytes
STEP = re.compile(r"step_(\d{6,15})")
RANK_FILE = re.compile(r"rank_\d{5,8}\.safetensors")


class CheckpointError(ConfigError):
    """A checkpoint that is damaged, or cannot be written; the text says which file, and why."""


class OtherFormatError(ConfigError):
    """A checkpoint that is whole, but of another version of this program."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A file that is not there is damage; one that this machine cannot read now may be whole."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


@dataclass(frozen=True)
class Slice:
    """A part of a tensor: its first index and size along each dimension, and its file."""

    file: str
    first: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A whole tensor: its shape, and where its slices are; together they cover it once."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class SavedFile:
    size: CountOrZero
    sha256: str


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that a manifest says besides its files and tensors.

    The batches, the dropout masks and the learning rate of a step follow from the config and the
    step alone, so there is no state of a random generator, of the data or of the schedule.
    """

    step: CountOrZero
    updates: CountOrZero
    """Steps that were not skipped: AdamW's own count."""
    skipped: CountOrZero
    tokens_seen: Annotated[int, Bounds(0, 2**62)]
    dtype: str
    """In which the run computes, as torch calls it."""
    data: dict
    """The SHA-256 of each file of the corpus, by name."""
    config: TrainConfig


@dataclass(frozen=True)
class Manifest:
    progress: Progress
    files: dict[str, SavedFile]
    tensors: dict[str, SavedTensor]


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first, whatever state they are in."""
    found = [path for path in run.glob("step_*") if STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def found_in(path: Path) -> list[Path]:
    """The checkpoint that path is, or those of the run folder that it is, newest first."""
    one = path if STEP.fullmatch(path.name) else Path(os.path.realpath(path))
    return [one] if STEP.fullmatch(one.name) and one.exists() else checkpoints(path)


def checkpoints_in(path: Path) -> list[Path]:
    """found_in, which finds some. Raises ConfigError if there is none."""
    found = found_in(path)
    if not found:
        raise ConfigError(f"{path} holds no checkpoint; give a run folder, or its step_NNNNNN")
    return found


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError for a manifest that is missing, damaged, or refers to the outside.

    The folder itself may be a link that the user has made; the files in it are what is written.
    """
    path = folder / MANIFEST
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(
            f"{folder} leads to {folder.readlink()}, which is not there now; mount that disk"
        )
    with reading(path):
        _check_file(path)
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{path} has more than {LARGEST_MANIFEST} bytes")
        content = path.read_bytes()
    try:
        return _parse_manifest(content, folder)
    except OtherFormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {short(error)}") from None


def _parse_manifest(content: bytes, folder: Path) -> Manifest:
    values = json.loads(content)
    if not isinstance(values, dict) or content != with_own_hash(values):
        raise ValueError("its own SHA-256 does not fit it")
    if values["format"] not in (2, FORMAT):
        raise OtherFormatError(
            f"{folder} has format {values['format']}, and this program reads 2 and {FORMAT}; use "
            f"the program that wrote it"
        )
    files = {}
    for name, facts in values["files"].items():
        if not RANK_FILE.fullmatch(name):
            raise ValueError(f"file name {name!r} is refused; it can be rank_00000.safetensors")
        files[name] = config_from_dict(SavedFile, facts, name)
    tensors = {}
    for name, facts in values["tensors"].items():
        if values["format"] == 2:
            facts = from_format_2(facts)
        slices = tuple(
            Slice(one.pop("file"), *(tuple(one.pop(key)) for key in ("first", "size")), **one)
            for one in facts.pop("slices")
        )
        if unknown := {one.file for one in slices} - set(files):
            raise ValueError(f"{name} lies in {unknown}, which is not among its files")
        shape = tuple(facts.pop("shape"))
        for first, size in [((0,) * len(shape), shape), *((one.first, one.size) for one in slices)]:
            sides = zip(first, size, shape, strict=True)
            if not all(type(a) is type(n) is int and 0 <= a < a + n <= end for a, n, end in sides):
                raise ValueError(f"{name} has no part of size {size} from {first} on")
        tensors[name] = SavedTensor(shape=shape, slices=slices, **facts)
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if numbers > sum(file.size for file in files.values()):
        raise ValueError(f"its tensors hold {numbers} numbers, more than its files have bytes")
    progress = config_from_dict(Progress, values["progress"], "progress")
    progress.config.model.check()
    if progress.step != step_of(folder):
        raise ValueError(f"it is of step {progress.step}")
    return Manifest(progress, files, tensors)


def from_format_2(facts: dict[str, Any]) -> dict[str, Any]:
    """What format 2 says of a tensor: its slices lie along one dimension, from start to stop."""
    dim, shape = facts.pop("dim"), facts["shape"]
    for one in facts["slices"]:
        start, stop = one.pop("start"), one.pop("stop")
        one["first"] = [start if d == dim else 0 for d in range(len(shape))]
        one["size"] = [stop - start if d == dim else n for d, n in enumerate(shape)]
    return facts


def with_own_hash(values: dict[str, Any]) -> bytes:
    """The manifest's bytes: JSON that holds, last, the SHA-256 of the same JSON without it."""
    body = {key: value for key, value in values.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps(body | {"sha256": own}, indent=1).encode() + b"\n"


def check_files(folder: Path, manifest: Manifest, first: int = 0, every: int = 1) -> None:
    """Raises CheckpointError unless each byte is as written, and nothing is missing or new.

    It reads the files number first, first + every, ...: ranks can divide the work.
    """
    present = {path.name for path in folder.iterdir()}
    if extra := present - set(manifest.files) - {MANIFEST}:
        raise CheckpointError(f"{folder / min(extra)} does not belong there")
    for name, facts in sorted(manifest.files.items())[first::every]:
        path = folder / name
        with reading(path):
            _check_file(path)
            size = path.stat().st_size
            if size != facts.size:
                raise CheckpointError(f"{path} has {size} bytes instead of {facts.size}")
            if sha256_of(path) != facts.sha256:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")


def is_sound(folder: Path) -> bool:
    try:
        check_files(folder, read_manifest(folder))
    except ConfigError:
        return False
    return True


def _check_file(path: Path) -> None:
    """Raises CheckpointError unless path is a file and no link, OSError if it is not there."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "of the wrong kind"
        raise CheckpointError(f"{path} is {kind}, and refused")
