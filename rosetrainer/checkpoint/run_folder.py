"""Run folders: what a run is stands in them, beside its checkpoints, and one process holds them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import IO, Any

from rosetrainer.checkpoint.manifest import MANIFEST, STEP, found_in
from rosetrainer.config import TrainConfig
from rosetrainer.data.corpus import load_tokenizer
from rosetrainer.data.tokenizer import Tokenizer
from rosetrainer.durable_files import write_json, write_whole
from rosetrainer.validation import ConfigError, config_from_dict, one_line

CONFIG, META, TOKENIZER = "config.json", "meta.json", "tokenizer.json"
LOCK = ".lock"
RUNS = Path("out")


def new_run_folder(wanted: Path | None) -> Path:
    """Makes the folder of a new run: `wanted`, or the next free out/run-NNN.

    Raises ConfigError if `wanted` cannot be made or is not empty: no run is overwritten.
    """
    if wanted is not None:
        check_run_folder(wanted)
        with one_line(f"out={wanted} cannot be made", "choose another --out"):
            wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    number = 1
    while True:
        folder = RUNS / f"run-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.is_dir():
                problem = f"cannot make {folder}: {error.strerror}"
                raise ConfigError(f"{problem}; use --out DIR") from None
        number += 1


def check_run_folder(wanted: Path | None) -> None:
    """Raises ConfigError if `wanted`, or out/, is not a folder that can be made and written to.

    What `wanted` names must be new or empty.
    """
    with one_line(f"out={wanted or RUNS}", "choose another --out"):
        if wanted and wanted.exists() and not (wanted.is_dir() and is_empty(wanted)):
            raise ConfigError(f"out={wanted} is not empty; choose another --out, or leave it out")
        for folder in Path(os.path.realpath(wanted)).parents if wanted else ():
            if (folder / CONFIG).is_file() and (folder / LOCK).is_file():
                raise ConfigError(
                    f"out={wanted} lies inside the run {folder}; choose another --out"
                )
        wanted = wanted or RUNS
        nearest = (wanted, *wanted.absolute().parents)
        parent = next(folder for folder in nearest if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"out={wanted} cannot be made in {parent}; choose another --out")


def is_empty(folder: Path) -> bool:
    """Whether nothing is there but what a run leaves that was killed, or failed, as it began."""
    left = (LOCK, ".*.part", "error_rank_*.txt")
    return all(any(path.match(name) for name in left) for path in folder.iterdir())


def lock_run(folder: Path) -> IO[str]:
    """Holds the run folder for this process until the file is closed, at the latest by its end.

    Raises ConfigError, with the process that has it, if another one is at work there.
    """
    with one_line(f"cannot lock {folder}", "choose another --out"), ExitStack() as on_error:
        file = on_error.enter_context((folder / LOCK).open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.readline(200).strip() or "another process"
            raise ConfigError(
                f"{folder} is in use by {holder}; wait until it ends, stop it, or choose another "
                f"--out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        on_error.pop_all()
    return file


def same_place(one: Path, other: Path) -> bool:
    """Whether both are there and are the same folder, whatever links lead to it."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def check_unlocked(folder: Path) -> None:
    """Raises ConfigError if another process is at work in the run folder."""
    lock_run(folder).close()


def read_config(folder: Path) -> TrainConfig:
    """Raises ConfigError if it cannot be read, or is not of such a run."""
    path = folder / CONFIG
    values = TrainConfig.upgrade(_read_json(path))
    if missing := [f.name for f in fields(TrainConfig) if f.name not in values]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: it is of another program")
    return config_from_dict(TrainConfig, values, str(path))


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What the run's meta.json says of its corpus; None if it cannot be read."""
    try:
        meta = _read_json(folder / META)
    except ConfigError:
        return None
    return meta if isinstance(meta.get("sha256"), dict) else None


def describe_run(folder: Path, config: TrainConfig, corpus: Path) -> None:
    """Writes what the run is: the config, what its data were, and how their tokens are read.

    Before the first step, so that no other run takes the folder for its own.
    """
    if (folder / CONFIG).exists():
        # What was first asked of the dtype tells one command from another.
        config = config.with_settings(dtype=read_config(folder).precision.dtype)
    write_json(folder / CONFIG, asdict(config))
    for name in (META, TOKENIZER):
        if (corpus / name).exists():
            write_whole(folder / name, partial(shutil.copyfile, corpus / name))


def latest_run() -> Path:
    """The run in out/ that saved last. Raises ConfigError if none has a checkpoint."""
    manifests = [path for path in RUNS.glob(f"*/*/{MANIFEST}") if STEP.fullmatch(path.parent.name)]
    if not manifests:
        raise ConfigError(f"no run with a checkpoint in {RUNS}/; train one, or give --run DIR")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent.parent


def run_of(path: Path) -> Path:
    """The run folder that path is, or in which the checkpoint lies that it is."""
    found = found_in(path)
    return found[0].parent if found else path


def read_run(folder: Path) -> tuple[TrainConfig, Tokenizer]:
    """What a run folder says of its model, and of the text that its tokens stand for.

    Raises ConfigError for what cannot be read, or does not belong together.
    """
    config = read_config(folder)
    config.model.check()
    if config.model.architecture == "bert":
        raise ConfigError(
            f"{folder} is a bert, which goes on with no text; `convert to-hf` makes a folder of it "
            f"for Hugging Face's library"
        )
    tokenizer = load_tokenizer(folder, _read_json(folder / META))
    known, size = tokenizer.vocab_size, config.model.vocab_size
    behind = config.model.architecture in ("t5", "glm")  # which have tokens that no text has
    if known > size or (known < size and not behind and not config.run.init_from):
        raise ConfigError(
            f"{folder / META} has {known} tokens and the model {size}: they are of different runs"
        )
    if not behind:  # a model of others may have more ids than its tokenizer, for an even size
        tokenizer.pieces += [b""] * (size - known)
    return config, tokenizer


def _read_json(path: Path) -> dict[str, object]:
    advice = f"a run's folder, as {RUNS}/run-001, has it: pass one, or a checkpoint in it"
    with one_line(f"{path} cannot be read", advice):
        content = path.read_bytes()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # the latter for brackets without an end
        raise ConfigError(f"{path} cannot be read: {error}; was it copied whole?") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold an object, not {type(values).__name__}")
    return values
