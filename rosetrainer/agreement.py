"""What all ranks have to know of each other: settings before the first step, a wish to stop."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rosetrainer.comm import all_gather, all_reduce
from rosetrainer.config import TrainConfig
from rosetrainer.data import Corpus
from rosetrainer.environment import world_from_environment
from rosetrainer.fields import ConfigError
from rosetrainer.parallel_context import Axis


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
    config: TrainConfig, corpus: Corpus, world: Axis, device: torch.device
) -> None:
    """Raises ConfigError on every rank if one was started with another config or other data.

    Before the layout is built: ranks that disagree on it would wait for each other for ever.
    """
    settings = json.dumps(flat_settings(config, corpus))
    own = torch.frombuffer(bytearray(hashlib.sha256(settings.encode()).digest()), dtype=torch.int64)
    hashes = all_gather(own[None].to(device), world, "start", dim=0)
    if bool((hashes == hashes[0]).all()):
        return
    of_ranks = [json.loads(text) for text in gather_texts(settings, world, device)]
    rank = next(r for r, settings in enumerate(of_ranks) if settings != of_ranks[0])
    other, first = of_ranks[rank], of_ranks[0]
    keys = [key for key in first if other.get(key) != first[key]]
    told = ", ".join(f"{key}={other.get(key)} and not {first[key]}" for key in keys[:5])
    raise ConfigError(f"rank {rank} has {told} like rank 0; start all ranks with the same flags")


def flat_settings(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Every setting by name, and the hashes of the data."""
    parts = {**asdict(config), "data": corpus.meta.sha256, "torch": {"torch": torch.__version__}}
    settings = {key: value for part in parts.values() for key, value in part.items()}
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def agree_to_stop(
    own: signal.Signals | None, world: Axis, device: torch.device
) -> signal.Signals | None:
    """A signal that has reached any rank, or None: the same on all ranks."""
    wish = torch.tensor(own or 0, device=device)
    agreed = int(all_reduce(wish, world, "stop", dist.ReduceOp.MAX))
    return signal.Signals(agreed) if agreed else None
