"""What ranks compare: their settings before the first step, and between steps a signal to stop."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rosetrainer.config import TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.environment import name_ranks, world_from_environment
from rosetrainer.parallel.comm import all_gather, all_reduce
from rosetrainer.parallel.context import Axis
from rosetrainer.validation import ConfigError


def world_axis() -> Axis:
    """All ranks as one axis: the default process group."""
    rank, size, _, _ = world_from_environment()
    return Axis("world", size, rank)


def gather_texts(text: str, world: Axis, device: torch.device) -> list[str]:
    """The text of each rank, on every rank."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor(len(content), device=device)
    longest = int(all_reduce(length, world, "start", dist.ReduceOp.MAX))
    padded = torch.zeros(1, longest + 1, dtype=torch.uint8, device=device)
    padded[0, : len(content)] = content
    rows = all_gather(padded, world, "start", dim=0)
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


def check_same_settings(
    config: TrainConfig, corpus: Corpus, compiled: bool, world: Axis, device: torch.device
) -> None:
    """Raises ConfigError on every rank if one has another config, other data or other software.

    And if "auto" has resolved to another value there. Before the layout is built: ranks that
    disagree on it would wait for each other for ever.
    """
    own = json.dumps([given_settings(config, corpus), resolved_settings(config, compiled, device)])
    digest = bytearray(hashlib.sha256(own.encode()).digest())
    row = torch.frombuffer(digest, dtype=torch.int64)[None].to(device)
    hashes = all_gather(row, world, "start", dim=0)
    if bool((hashes == hashes[0]).all()):
        return
    settings = [json.loads(text) for text in gather_texts(own, world, device)]
    given, resolved = (list(part) for part in zip(*settings, strict=True))
    if found := difference(given)[0]:
        raise ConfigError(f"{found}; start all ranks with the same flags")
    if len({one["dtype"] for one in resolved}) > 1:
        for one in resolved:
            del one["kernels"]  # which follow from it
    found, keys = difference(resolved)
    flags = {
        "dtype": "--dtype float32",
        "threads": f"--threads {min(one['threads'] for one in resolved)}",
        "kernels": "--kernels torch",
        "compile": "--compile off",
    }
    remedy = f"start all ranks with {' '.join(flags[key] for key in keys if key in flags)}"
    if {"torch", "rosetrainer"} & set(keys):
        remedy = "install the same versions for all ranks"
    raise ConfigError(f"{found}; {remedy}")


def difference(of_ranks: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """How the first ranks that differ from rank 0 differ, and in which keys; "" if none does."""
    first = of_ranks[0]
    other = next((own for own in of_ranks if own != first), first)
    ranks = [rank for rank, own in enumerate(of_ranks) if own == other]
    keys = [key for key in first if other.get(key) != first[key]]
    found = ", ".join(f"{key}={other.get(key)} and not {first[key]}" for key in keys[:5])
    return f"{name_ranks(ranks)} {found} like rank 0" if keys else "", keys


def given_settings(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Every setting as it was given, by name, and the hashes of the data."""
    parts = {**asdict(config), "data": corpus.meta.sha256}
    settings = {key: value for part in parts.values() for key, value in part.items()}
    del settings["compute_dtype"], settings["compute_kernels"]
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def resolved_settings(config: TrainConfig, compiled: bool, device: torch.device) -> dict[str, Any]:
    """What decides the bits that this rank computes and depends on more than the flags."""
    dtype = config.precision.compute_dtype
    assert dtype, "settle comes first"
    on_cpu = device.type == "cpu"
    return {
        "dtype": dtype,
        "threads": torch.get_num_threads() if on_cpu else 0,
        "compile": "on" if compiled else "off",
        "kernels": config.precision.compute_kernels,
        "torch": torch.__version__,
        "rosetrainer": source_version(),
    }


def source_version() -> str:
    """A hash of this package's source: all checkouts have the same version number."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def agree_to_stop(
    own: signal.Signals | None, world: Axis, device: torch.device
) -> signal.Signals | None:
    """A signal that any rank has received, or None; the same on all ranks."""
    received = torch.tensor(own or 0, device=device)
    agreed = int(all_reduce(received, world, "stop", dist.ReduceOp.MAX))
    return signal.Signals(agreed) if agreed else None
