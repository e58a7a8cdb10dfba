"""Run folders: whole weights in safetensors beside the config, the same for every layout."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosetrainer.blocks import build_model
from rosetrainer.config import TrainConfig
from rosetrainer.durable_files import write_whole
from rosetrainer.fields import ConfigError, config_from_dict
from rosetrainer.parallel_context import ParallelContext
from rosetrainer.tensor_parallel import check_whole, gather_whole
from rosetrainer.tokenizer import Tokenizer, load_tokenizer

WEIGHTS, CONFIG, META, TOKENIZER = "model.safetensors", "config.json", "meta.json", "tokenizer.json"
LOCK = ".lock"
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
        if wanted and wanted.exists() and not (wanted.is_dir() and is_empty(wanted)):
            raise ConfigError(f"out={wanted} is not empty; choose another --out, or leave it out")
        wanted = wanted or RUNS
        nearest = (wanted, *wanted.absolute().parents)
        parent = next(folder for folder in nearest if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"out={wanted} cannot be made in {parent}; choose another --out")
    except OSError as error:
        raise ConfigError(f"out={wanted}: {error.strerror}; choose another --out") from None


def is_empty(folder: Path) -> bool:
    """Whether nothing is there but what a run leaves that was killed, or failed, as it began."""
    left = (LOCK, ".*.part", "error_rank_*.txt")
    return all(any(path.match(name) for name in left) for path in folder.iterdir())


def lock_run(folder: Path) -> IO[str]:
    """Holds the run folder for this process until the file is closed, at the latest by its end.

    Raises ConfigError, with the process that has it, if another one is at work there.
    """
    try:
        file = (folder / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise ConfigError(
                f"{folder} is in use by {holder}; wait until it ends, stop it, or choose another "
                f"--out"
            ) from None
        except OSError:
            file.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot lock {folder}: {error.strerror}; choose another --out") from None
    return file


def check_unlocked(folder: Path) -> None:
    """Raises ConfigError if another process is at work in the run folder."""
    lock_run(folder).close()


def weights_step(folder: Path) -> int:
    """After how many steps the folder's weights were saved; 0 if there are none."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return int((file.metadata() or {}).get("step", "0"))
    except (OSError, SafetensorError, ValueError):
        return 0


def read_config(folder: Path) -> TrainConfig:
    """Raises ConfigError if it cannot be read."""
    return config_from_dict(TrainConfig, _read_json(folder / CONFIG), str(folder / CONFIG))


def describe_run(folder: Path, config: TrainConfig, corpus: Path) -> None:
    """Writes the config, and what is needed of the corpus to read and write its tokens."""
    text = json.dumps(asdict(config), indent=2, default=str) + "\n"
    write_whole(folder / CONFIG, lambda part: part.write_text(text))
    for name in (META, TOKENIZER):
        if (corpus / name).exists():
            write_whole(folder / name, partial(shutil.copyfile, corpus / name))


def save_weights(folder: Path, model: nn.Module, context: ParallelContext, step: int) -> None:
    """Gathers the whole weights, on all ranks, and writes them on rank 0."""
    whole = gather_whole(model, context.tp)
    if context.rank == 0:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
        after = {"step": str(step)}
        write_whole(folder / WEIGHTS, lambda part: save_file(tensors, part, after))


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
    config = read_config(folder)
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
    check_whole(build_model(config.model, shapes_only), whole)
    return config, whole, tokenizer


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold an object, not {type(values).__name__}")
    return values
