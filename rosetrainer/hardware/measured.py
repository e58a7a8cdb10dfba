"""What this machine is fast at, measured once and kept in a file of the user's cache.

In $ROSETRAINER_CACHE, or $XDG_CACHE_HOME/rosetrainer, or ~/.cache/rosetrainer: one file for each
processor and version of torch. Of a machine's ranks the first measures while
the others wait, so that all of them choose alike.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rosetrainer.durable_files import short, write_json
from rosetrainer.environment import world_from_environment
from rosetrainer.hardware import kernel_times
from rosetrainer.hardware.kernel_times import Ratios
from rosetrainer.hardware.processor import has_native_bf16, processor

FASTER = 0.9
"""Of the usual way's time, at most, for another way to be taken."""

VERSION = 1
"""Of what is measured: a file of another one is measured anew."""

PATIENCE_SECONDS = 20.0
"""For another process that is measuring."""

LARGEST = 2**16
"""Bytes of a file of ours, by far."""


@dataclass(frozen=True)
class Measured:
    """What was measured, and when and where, in words for the log."""

    ratios: Ratios
    source: str

    def is_faster(self, what: str) -> bool:
        """what: a field of Ratios."""
        return bool(getattr(self.ratios, what) <= FASTER)

    def why(self, dtype: str, kernels: str) -> str:
        """A line for the log: what auto is, and why; "" for what was not chosen by this."""
        known, chosen = 0 < self.ratios.bf16 < math.inf, []
        if dtype:
            times = f" (a block in bfloat16 takes {self.ratios.bf16:.2f} of one in float32)"
            chosen.append(f"dtype=auto is {dtype}{times * known}")
        if kernels:
            times = f" (oneDNN's linear takes {self.ratios.linear:.2f} of torch's time, its sums "
            times += f"{self.ratios.sums:.2f})"
            chosen.append(f"kernels=auto is {kernels}{times * known}")
        return f"{', '.join(chosen)}; {self.source}"


@cache
def machine() -> Measured:
    """Looks once, and measures only if it has to."""
    return look_up(cache_folder(), key_of_this_machine())


def cache_folder() -> Path:
    """Absolute, unless the user has no home."""
    if own := os.environ.get("ROSETRAINER_CACHE"):
        return Path(own).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "relative")  # the standard ignores such ones
    home = Path(os.path.expanduser("~/.cache"))
    return (shared if shared.is_absolute() else home) / "rosetrainer"


def key_of_this_machine() -> dict[str, Any]:
    """What the times depend on."""
    name, flags = processor()
    instructions = torch.backends.cpu.get_cpu_capability()  # which the environment may limit
    digest = hashlib.sha256(f"{instructions} {flags}".encode()).hexdigest()[:8]
    return {
        "processor": name,
        "flags": digest,
        "torch": torch.__version__,
        "version": VERSION,
    }


def path_of(folder: Path, key: dict[str, Any]) -> Path:
    words = [re.sub(r"[^A-Za-z0-9.+]+", "-", str(value)) for value in key.values()]
    return folder / f"{'_'.join(words)[:200]}.json"


def look_up(folder: Path, key: dict[str, Any]) -> Measured:
    """From the file, or measured and kept there. Without a place to keep it ranks of one machine
    might come to different things, so several of them go by the processor's flags."""
    path = path_of(folder, key)
    kept = f"as kept in {path}"
    if ratios := read(path, key):
        return Measured(ratios, kept)
    try:
        with locked(path):
            if ratios := read(path, key):
                return Measured(ratios, kept)
            ratios = kernel_times.measure()
            keep(path, key, ratios)
            return Measured(ratios, f"measured now, kept in {path}")
    except OSError as error:
        problem = f"for {path} cannot be written: {short(error)}"
    if world_from_environment()[3] == 1:
        return Measured(kernel_times.measure(), f"measured now and at every start, {problem}")
    native = has_native_bf16(torch.device("cpu"))
    return Measured(Ratios(0.0 if native else math.inf), f"by the processor's flags, {problem}")


def read(path: Path, key: dict[str, Any]) -> Ratios | None:
    """None for a file that is not there, is broken or is about something else."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        found = json.loads(path.read_bytes())
        ratios = Ratios(**found.pop("ratios"))
        numbers = [float(number) for number in asdict(ratios).values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    right = found == key and all(0 < number < math.inf for number in numbers)
    return Ratios(*numbers) if right else None


def keep(path: Path, key: dict[str, Any], ratios: Ratios) -> None:
    write_json(path, key | {"ratios": asdict(ratios)})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time. Raises OSError, a TimeoutError after PATIENCE_SECONDS."""
    if not path.is_absolute():
        raise FileNotFoundError("there is no home folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE_SECONDS
    with path.with_suffix(".lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("another process has been measuring for long") from None
                time.sleep(0.01)
        yield
