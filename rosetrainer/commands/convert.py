"""python -m rosetrainer convert from-hf DIR OUT, to-hf RUN OUT: Hugging Face's and ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from rosetrainer.checkpoint.export import whole_layers
from rosetrainer.checkpoint.huggingface.families import model_of, special_ids, written_as
from rosetrainer.checkpoint.huggingface.load import find_weights
from rosetrainer.checkpoint.huggingface.run_from import write_run
from rosetrainer.checkpoint.huggingface.write import write_folder
from rosetrainer.checkpoint.run_folder import TOKENIZER
from rosetrainer.checkpoint.saver import read_whole
from rosetrainer.commands.flags import parse_subcommand
from rosetrainer.durable_files import room, short, whole_folder
from rosetrainer.parallel.context import Axis
from rosetrainer.training.trained import sound_one
from rosetrainer.validation import POSITIONAL, Bounds, ConfigError


@dataclass(frozen=True)
class FromCommand:
    """Makes a run folder of a Hugging Face checkpoint, with a checkpoint of step 0."""

    folder: Annotated[Path, POSITIONAL]
    """Holds config.json and safetensors, as save_pretrained writes them."""
    out: Annotated[Path, POSITIONAL]
    """The run folder to make: new or empty."""


@dataclass(frozen=True)
class ToCommand:
    """Writes the newest sound checkpoint of a run as a folder that Hugging Face's library reads."""

    run: Annotated[Path, POSITIONAL]
    """A run folder, or one checkpoint."""
    out: Annotated[Path, POSITIONAL]
    """The folder to make: new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are rounded to."""
    shard_mb: Annotated[int, Bounds(1, 2**20)] = 5000
    """Most megabytes of one file; more are several, with an index."""


COMMANDS = {"from-hf": FromCommand, "to-hf": ToCommand}


def main(argv: list[str]) -> int:
    """The command. Raises ConfigError for a user's mistake, before anything is written."""
    command = parse_subcommand(COMMANDS, argv, "python -m rosetrainer convert")
    return from_hf(command) if isinstance(command, FromCommand) else to_hf(command)


def from_hf(command: FromCommand) -> int:
    model = model_of(command.folder)
    weights = find_weights(command.folder, model)
    with new_folder(command.out) as part:
        remark = write_run(part, weights, model)
    tensors = len(weights.stored) - len(weights.derived) - len(weights.no_place)
    print(f"{command.out}: {tensors} tensors of {command.folder}, {model.architecture}, as fp32")
    for told, names in (
        ("not read, as they follow from others", weights.derived),
        ("not read, as our model has no place for them", weights.no_place),
        ("not in the folder, so random", weights.new),
    ):
        if names:
            print(f"{told}: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}")
    if remark:
        print(remark)
    return 0


def to_hf(command: ToCommand) -> int:
    folder, manifest = sound_one(command.run, Axis("world"), torch.device("cpu"))
    layers, config = whole_layers(folder, manifest), manifest.progress.config.model
    model_type, _ = written_as(config)

    def whole(name: str) -> torch.Tensor:
        return read_whole(folder, manifest, name).reshape(layers[name].dense_shape)

    dtype: torch.dtype = getattr(torch, command.dtype)
    with new_folder(command.out) as part:
        special = special_ids(folder.parent)
        count = write_folder(part, config, layers, whole, dtype, command.shard_mb * 10**6, special)
        if (tokenizer := folder.parent / TOKENIZER).exists():
            shutil.copyfile(tokenizer, part / TOKENIZER)
    print(f"{command.out}: {count} tensors of {folder.name}, {model_type}, {command.dtype}")
    return 0


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """whole_folder. Raises ConfigError if `out` is in use, or cannot be written."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there and not empty; name a new folder")
    try:
        with whole_folder(out.absolute()) as part:
            yield part
    except OSError as error:
        parent = next(p for p in out.absolute().parents if p.exists())
        raise ConfigError(
            f"cannot write {out}: {short(error)}; {room(parent)} bytes can be written there; name "
            f"another folder"
        ) from None
