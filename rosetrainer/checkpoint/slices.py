"""A checkpoint on disk: a file of each rank and a manifest, there whole or not at all.

out/RUN/step_000100/ is written under a hidden name, synced, the manifest last, then renamed. Ranks
publish the metadata of their files beside them, so no collective is needed and a save can overlap
with training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rosetrainer.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    Progress,
    checkpoints,
    folder_name,
    is_sound,
    with_own_hash,
)
from rosetrainer.durable_files import room, sha256_of, short, sync_folder, write_whole

VISIBLE = "[!.]*"
"""The pattern of all but hidden files, as the lock and drafts are."""

Marks = dict[str, tuple[int, int]]
"""By a file's name, what another program's writing would change: see mark_of."""


def mark_of(path: Path) -> tuple[int, int]:
    """Size and time of the last change."""
    facts = path.lstat()
    return facts.st_size, facts.st_mtime_ns


def marks_of(folder: Path, pattern: str = "*") -> Marks:
    """Of all in the folder whose names fit the pattern; none if it is not there."""
    return {path.name: mark_of(path) for path in folder.glob(pattern)}


@dataclass(frozen=True)
class Written:
    """A checkpoint that was just written, and the marks of its files as they were hashed."""

    folder: Path
    marks: Marks


@dataclass(frozen=True)
class Draft:
    """A checkpoint while it is being written. `attempt` tells apart what runs of a run left."""

    run: Path
    step: int
    attempt: str

    @property
    def folder(self) -> Path:
        return self.run / f".{folder_name(self.step)}.{self.attempt}.part"

    def write_part(
        self, rank: int, tensors: dict[str, Tensor], slices: dict[str, Any], need: int
    ) -> None:
        """Writes this rank's file, then its metadata. need: the bytes of all ranks' tensors.

        Raises CheckpointError, and leaves nothing but metadata with the error.
        """
        self.write_file(rank, lambda part: save_file(tensors, part), slices, need)

    def write_file(
        self, rank: int, write: Callable[[Path], object], slices: dict[str, Any], need: int
    ) -> None:
        """As write_part; `write` makes the file of the slices."""
        name = f"rank_{rank:05d}.safetensors"
        path, has = self.folder / name, room(self.run)
        try:
            self.folder.mkdir(exist_ok=True)
            write_whole(path, write)
            size, mtime_ns = mark_of(path)
            facts = {"size": size, "mtime_ns": mtime_ns, "sha256": sha256_of(path)}
            self._publish_metadata(name, facts | {"slices": slices})
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            text = (
                f"cannot write a checkpoint in {self.run}: {short(error)}; it needs {need:,} bytes "
                f"and has {has}; the older checkpoints are as they were: free some space, and the "
                f"same command goes on"
            )
            with contextlib.suppress(OSError):
                self._publish_metadata(name, {"error": text})
            raise CheckpointError(text) from None

    def _publish_metadata(self, name: str, metadata: dict[str, Any]) -> None:
        """For rank 0, which renames the folder once it has read that of all: a rank's last access.

        It appears whole, and is not synced: by then the folder may have its final name.
        """
        part = self.folder / f".{name}.json.part"
        part.write_text(json.dumps(metadata))
        part.replace(self.folder / f"{name}.json")

    def complete(self, world_size: int, progress: Progress) -> Written:
        """Waits for the metadata of all ranks, writes the manifest, and gives the folder its name.

        The hang watch ends a run in which a rank hangs. Raises CheckpointError, and leaves
        nothing, if one could not write.
        """
        files: dict[str, Any] = {}
        marks = {}
        tensors: dict[str, Any] = {}
        try:
            for rank in range(world_size):
                name = f"rank_{rank:05d}.safetensors"
                metadata = self._await_metadata(name)
                for tensor, facts in metadata.pop("slices").items():
                    one = {"file": name, "first": facts.pop("first"), "size": facts.pop("size")}
                    tensors.setdefault(tensor, facts | {"slices": []})["slices"].append(one)
                marks[name] = metadata["size"], metadata.pop("mtime_ns")
                files[name] = metadata
            stands = json.loads(json.dumps(asdict(progress), default=str))
            values = {"format": FORMAT, "progress": stands, "files": files, "tensors": tensors}
            content = with_own_hash(values)
            write_whole(self.folder / MANIFEST, lambda part: part.write_bytes(content))
            marks[MANIFEST] = mark_of(self.folder / MANIFEST)
            return Written(self.name_whole(), marks)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot write in {self.run}: {short(error)}") from None

    def name_whole(self) -> Path:
        """From now on it is a checkpoint."""
        final = self.run / folder_name(self.step)
        if os.path.lexists(final):  # a damaged one, that was passed over
            remove(final)
        self.folder.rename(final)
        sync_folder(self.run)
        return final

    def _await_metadata(self, name: str) -> dict[str, Any]:
        path, pause = self.folder / f"{name}.json", 0.002
        while not path.exists():
            time.sleep(pause)
            pause = min(2 * pause, 0.1)  # a rank that waits must not look like one at work
        metadata: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        if "error" in metadata:
            raise CheckpointError(metadata["error"])
        return metadata


def retain(run: Path, keep: int, written: Written | None = None) -> None:
    """Removes checkpoints but the newest `keep`, and none if not one of those is sound.

    written: what this process has just written, which need not be read again.
    """
    kept, others = checkpoints(run)[:keep], checkpoints(run)[keep:]
    untouched = written and written.folder in kept and marks_of(written.folder) == written.marks
    if others and (untouched or any(map(is_sound, kept))):
        for folder in others:
            remove(folder)


def remove(folder: Path) -> None:
    """Under another name first: half a checkpoint must not look like one.

    Of a link only the link goes: what lies outside of the run folder is the user's.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def clear_drafts(run: Path) -> None:
    """Removes what killed processes left; only for the one that holds the run's lock."""
    for pattern in (".step_*.part", ".step_*.old"):
        for folder in run.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
