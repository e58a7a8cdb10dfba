"""Files that are there whole or not at all, on the disk and not only in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rosetrainer.heartbeat import HEARTBEAT

BLOCK_BYTES = 2**20
"""Hashed at a time."""

SYNC_BYTES = 2**26
"""Written to the disk at a time; a multiple of any system's page."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """As write_whole; what JSON has no form for, a Path say, as its text."""
    text = json.dumps(values, indent=2, default=str) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """path as `write` makes it, synced, whole or as it was before, with the mode of the umask."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode
        HEARTBEAT.growing.add(part)
        write(part)
        part.chmod(mode)  # safetensors makes a file anew, which only its owner may read
        sync_file(part)
        part.replace(path)
        sync_folder(path.parent)
    finally:
        HEARTBEAT.growing.discard(part)
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that takes its name at the end: it is there whole, or not.

    `path` is new or an empty folder. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        sync_folder(part)
        part.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Block by block, with a sign of work for each: a slow disk takes minutes for all at once."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        with contextlib.suppress(ValueError), mmap.mmap(file.fileno(), size) as content:
            for start in range(0, size, SYNC_BYTES):
                content.flush(start, min(SYNC_BYTES, size - start))
                HEARTBEAT.beats += 1
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(partial(file.read, BLOCK_BYTES), b""):
            digest.update(block)
            HEARTBEAT.beats += 1
    return digest.hexdigest()


def free(path: str | Path) -> Path:
    """path, or if that is taken text-2.txt, text-3.txt, … for text.txt."""
    free = path = Path(path)
    number = 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def room(folder: Path) -> str:
    """How much may be written: the disk's free bytes, or the limit on a file's size if less."""
    free = shutil.disk_usage(folder).free
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < free:
        return f"{limit:,} (the limit on a file's size, see ulimit -f)"
    return f"{free:,}"


def short(error: Exception) -> str:
    """One line for a message of ours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    reason = str(error).rpartition("I/O error: ")[2]  # without safetensors' words before it
    return reason.splitlines()[0][:300] if reason else type(error).__name__
