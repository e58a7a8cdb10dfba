"""Writes a model of ours as a folder of theirs, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rosetrainer.checkpoint.huggingface.families import FAMILIES, written_as
from rosetrainer.checkpoint.huggingface.folder import CONFIG, INDEX, ONE_FILE
from rosetrainer.checkpoint.huggingface.source import Source
from rosetrainer.checkpoint.safetensors_file import Entry, write_safetensors
from rosetrainer.config import GPTConfig
from rosetrainer.durable_files import write_json, write_whole
from rosetrainer.parallel.sharding import ShardSpec


class Piece(NamedTuple):
    """One of ours, and the entries of theirs that are made of it."""

    name: str
    source: Source
    entries: list[Entry]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)


def write_folder(
    out: Path,
    config: GPTConfig,
    specs: dict[str, ShardSpec],
    whole: Callable[[str], Tensor],
    dtype: torch.dtype,
    most_bytes: int,
    special: dict[str, int] | None = None,
) -> int:
    """config.json and the weights; how many tensors these are.

    specs: our parameters'. whole: gives each by its name, of spec.dense_shape. most_bytes: of one
    file; with more there are several, and an index. special: ids of tokens that begin, end and pad
    a text, by the library's names. Raises ConfigError if no model of theirs is ours.
    """
    model_type, theirs = written_as(config)
    # Where nothing is known, null: their library's defaults would be tokens of this vocabulary.
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    dtype_name = str(dtype).removeprefix("torch.")
    theirs = {**no_ids, **(special or {}), **theirs, "dtype": dtype_name, "use_cache": True}
    pieces = []
    for name, spec in specs.items():
        source = FAMILIES[model_type].source_of(name, model_type)
        shape = source.shape_of_each(spec)
        pieces.append(Piece(name, source, [Entry(one, shape, dtype) for one in source.names]))
    files = divided(pieces, most_bytes)
    names: dict[str, str] = {}
    for number, chosen in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file = ONE_FILE if len(files) == 1 else file
        entries = [entry for piece in chosen for entry in piece.entries]
        names |= {entry.name: file for entry in entries}
        tensors = tensors_of(chosen, whole, dtype)
        write_whole(
            out / file,
            partial(write_safetensors, entries=entries, tensors=tensors, metadata={"format": "pt"}),
        )
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(p.size for p in pieces)}, "weight_map": names}
        write_json(out / INDEX, index)
    write_json(out / CONFIG, theirs)
    return len(names)


def divided(pieces: list[Piece], most_bytes: int) -> list[list[Piece]]:
    """In order, each list of at most so many bytes, or of one piece."""
    files: list[list[Piece]] = [[]]
    for piece in pieces:
        if files[-1] and sum(p.size for p in files[-1]) + piece.size > most_bytes:
            files.append([])
        files[-1].append(piece)
    return files


def tensors_of(
    pieces: list[Piece], whole: Callable[[str], Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    for piece in pieces:
        yield from (part.to(dtype) for part in piece.source.split(whole(piece.name)))
