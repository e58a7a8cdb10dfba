"""Run folders: whole weights in safetensors beside the config, the same for every layout.

Each file is written under a temporary name, synced, and renamed over the old one, so that a name
never stands for half a file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosetrainer.config import TrainConfig
from rosetrainer.fields import ConfigError, config_from_dict
from rosetrainer.model import GPTModel
from rosetrainer.parallel_context import ParallelContext
from rosetrainer.tensor_parallel import check_whole, gather_whole
from rosetrainer.tokenizer import Tokenizer, load_tokenizer

WEIGHTS, CONFIG, META, TOKENIZER = "model.safetensors", "config.json", "meta.json", "tokenizer.json"
RUNS = Path("out")


def new_run_folder(wanted: Path | None) -> Path:
    """Makes the folder of a new run: `wanted`, or the next free out/run-NNN.

    Raises ConfigError if `wanted` cannot be made or is not empty: no run is overwritten.
    """
    if wanted is not None:
        check_run_folder(wanted)
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    number = 1
    while True:
        folder = RUNS / f"run-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if folder.is_dir():
                number += 1
                continue
            raise ConfigError(f"cannot make {folder}: {error.strerror}; use --out DIR") from None
        else:
            return folder


def check_run_folder(wanted: Path | None) -> None:
    """Raises ConfigError if `wanted`, or out/, is not a folder that can be made and written to.

    What `wanted` names must be new or empty.
    """
    try:
        if wanted and wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise ConfigError(f"out={wanted} is not empty; choose another --out, or leave it out")
        wanted = wanted or RUNS
        nearest = (wanted, *wanted.absolute().parents)
        parent = next(folder for folder in nearest if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"out={wanted} cannot be made in {parent}; choose another --out")
    except OSError as error:
        raise ConfigError(f"out={wanted}: {error.strerror}; choose another --out") from None


def describe_run(folder: Path, config: TrainConfig, corpus: Path) -> None:
    """Writes the config, and what is needed of the corpus to read and write its tokens."""
    text = json.dumps(asdict(config), indent=2, default=str) + "\n"
    _write(folder / CONFIG, lambda part: part.write_text(text))
    for name in (META, TOKENIZER):
        if (corpus / name).exists():
            _write(folder / name, partial(shutil.copyfile, corpus / name))


def save_weights(folder: Path | None, model: nn.Module, context: ParallelContext) -> None:
    """Gathers the whole weights, on all ranks, and writes them on the rank that has a folder."""
    whole = gather_whole(model, context.tp)
    if folder is not None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
        _write(folder / WEIGHTS, lambda part: save_file(tensors, part))


def latest_run() -> Path:
    """The newest out/run-* that has weights. Raises ConfigError if there is none."""
    runs = sorted(RUNS.glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ConfigError(f"no run with weights in {RUNS}/; train one, or give --run DIR")
    return runs[-1].parent


def load_run(folder: Path) -> tuple[TrainConfig, dict[str, Tensor], Tokenizer]:
    """(config, whole weights by name, tokenizer).

    Raises ConfigError for what cannot be read, or does not belong together.
    """
    config = config_from_dict(TrainConfig, _read_json(folder / CONFIG), str(folder / CONFIG))
    config.model.check()
    tokenizer = load_tokenizer(folder, _read_json(folder / META))
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{folder / META} has {tokenizer.vocab_size} tokens and the model "
            f"{config.model.vocab_size}: they are of different runs"
        )
    path = folder / WEIGHTS
    try:
        whole = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from None
    shapes_only = ParallelContext(device=torch.device("meta"))
    check_whole(GPTModel(config.model, shapes_only), whole)
    return config, whole, tokenizer


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold an object, not {type(values).__name__}")
    return values


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """path as `write` makes it, whole or as it was before."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
