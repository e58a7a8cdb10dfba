"""What to do where there is no corpus, by what is there instead; never to delete or overwrite."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rosetrainer.data.file_kinds import LLM_C
from rosetrainer.durable_files import free
from rosetrainer.environment import prepare_command

SOURCES = ("python-docs", "shakespeare", "file", "markov", "import")
BINS = ("train.bin", "val.bin")
TEXTS = (".txt", ".md", ".jsonl", ".ndjson", ".parquet", ".gz", ".bz2", ".xz")
TOKENIZERS = "the tokenizer.json that they are of, bytes, or ids"
FLAGS = (
    *("tokenizer", "vocab_size", "val_fraction"),
    *("order", "alphabet", "train_tokens", "val_tokens", "seed"),
)
OTHERS = {"file": " PATH...", "import": " PATH --tokenizer TOKENIZER"}


def make_command(
    folder: Path, source: str | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """The command that makes the corpus in folder.

    source: the subcommand; by the folder's name unless given. options: meta.json's; those of
    them that are flags are given again, since another corpus would not be replaced.
    """
    if source not in SOURCES:
        source = folder.name if folder.name in SOURCES else "file"
    words = [prepare_command(), source + OTHERS.get(source, "")]
    if source == "file" and "tokenizer_sha256" in (options or {}):
        words.append("--tokenizer TOKENIZER")
        options = {name: value for name, value in (options or {}).items() if name != "vocab_size"}
    for name in FLAGS if options and source != "import" else ():
        if (value := (options or {}).get(name)) is not None:
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    if folder != Path("data") / source:
        words.append(f"--out {shlex.quote(str(folder))}")
    return " ".join(words)


def no_corpus(folder: Path) -> str:
    """One line for a `folder` without meta.json: what it is, and what to do with it."""
    if folder.is_file():
        return f"{folder} is a file, and a corpus is a folder; {_of_a_file(folder)}"
    if not os.path.lexists(folder):
        return f"{folder} is not there; {_of_nothing(folder)}"
    if not folder.is_dir():
        return f"{folder} is no folder, and a corpus is one; {_own_text(folder)}"
    names = sorted(os.listdir(folder))
    if not names:
        return f"{folder} is empty; {_own_text(folder, folder)}"
    return f"{folder} holds no corpus: {_of_a_folder(folder, names)}"


def of_other_meta(folder: Path, values: Any) -> str:
    """For a meta.json that cannot be used: what is there stays, and a corpus is made beside it."""
    values = values if isinstance(values, dict) else {}
    source = values.get("source")
    if values and source not in SOURCES and all((folder / name).is_file() for name in BINS):
        return f"another program wrote it; {_of_bins(folder, os.listdir(folder), list(BINS))}"
    return f"`{make_command(_target(folder), source)}` makes a corpus in another folder"


def damaged(folder: Path, source: str, options: Mapping[str, Any]) -> str:
    """For a corpus whose ids are not what its meta.json says."""
    return (
        f"`{make_command(folder, source, options)}` makes it anew; ids of your own go into another "
        f"folder: `{prepare_command()} import --help`"
    )


def _of_a_file(path: Path) -> str:
    if (path.parent / "meta.json").is_file() and path.name in (*BINS, "meta.json"):
        return f"pass that of this one: --data {path.parent}"
    if path.suffix == ".bin":
        out = _quoted(free(Path("data") / path.stem))
        return (
            "if these are token ids, import them, with those for validation: `"
            f"{prepare_command()} import {_quoted(path)} VAL.bin --tokenizer TOKENIZER --out {out}`"
        )
    return _own_text(path)


def _own_text(path: Path, out: Path | None = None) -> str:
    """How a text becomes a corpus: the file at path, or PATH... if that is no file."""
    what = _quoted(path) if path.is_file() else "PATH..."
    out = out or free(Path("data") / path.stem)
    return (
        f"`{prepare_command()} file {what} --out {_quoted(out)}` makes one of "
        f"{'it' if path.is_file() else 'your own texts'}, for --data {out}"
    )


def _of_nothing(folder: Path) -> str:
    if folder.name in SOURCES[:2] or folder.name == "markov":
        return f"`{make_command(folder)}` makes it"
    corpora = _corpora(folder.parent)
    if close := difflib.get_close_matches(folder.name, corpora, n=1):
        return f"did you mean {folder.parent / close[0]}?"
    there = f"; corpora there: {_some(corpora)}" if corpora else ""
    return _own_text(folder, folder) + there


def _of_a_folder(folder: Path, names: list[str]) -> str:
    suffixes = {Path(name).suffix for name in names}
    if bins := [name for name in names if name.endswith(".bin")]:
        return _of_bins(folder, names, bins)
    if corpora := _corpora(folder):
        return f"those in it are {_some([str(folder / name) for name in corpora])}"
    if {"config.json", "log.jsonl"} <= set(names):
        return f"it is a run's folder, which goes on with --resume {_quoted(folder)}"
    if ".arrow" in suffixes or {"dataset_dict.json", "dataset_info.json"} & set(names):
        split = "['train']" if "dataset_dict.json" in names else ""
        lines = free("texts.jsonl")
        return (
            "it is a data set of Hugging Face's; write it as JSON lines, in Python "
            f"`datasets.load_from_disk({str(folder)!r}){split}.to_json('{lines}')`, then "
            f"`{prepare_command()} file {lines} --out {_quoted(_target(folder))}`"
        )
    for suffix in TEXTS:
        if suffix in suffixes:
            return (
                f"it holds texts; `{prepare_command()} file {_quoted(folder)}/*{suffix} --out "
                f"{_quoted(_target(folder))}` makes one of them"
            )
    return f"{_some(names)}; {_own_text(folder, _target(folder))}"


def _of_bins(folder: Path, names: list[str], bins: list[str]) -> str:
    """For nanoGPT's train.bin and val.bin, or llm.c's files."""
    target = _quoted(_target(folder))
    importing = f"--tokenizer TOKENIZER --out {target}` makes one (TOKENIZER: {TOKENIZERS})"
    missing = [side for side in ("train", "val") if not any(side in name for name in bins)]
    if missing:
        return (
            f"it has {bins[0]} and nothing for {missing[-1]}; with both, `"
            f"{prepare_command()} import TRAIN.bin VAL.bin {importing}"
        )
    pickled = "meta.pkl, a pickle, which could run code, is not opened"
    if "meta.pkl" in names and "input.txt" in names:
        return (
            f"it has nanoGPT's files, and {pickled}; `{prepare_command()} file "
            f"{_quoted(folder / 'input.txt')} --tokenizer chars --out {target}` makes the same ids "
            "of its text"
        )
    whose = "llm.c's" if any(_is_llm_c(folder / name) for name in bins) else "bare"
    note = f" ({pickled})" if "meta.pkl" in names else ""
    return (
        f"it has {whose} token ids, and what they stand for is not said{note}; "
        f"`{prepare_command()} import {_quoted(folder)} {importing}"
    )


def _is_llm_c(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return re.match(LLM_C, file.read(4)) is not None
    except OSError:
        return False


def _corpora(folder: Path) -> list[str]:
    """The names of the corpora in `folder`."""
    try:
        return sorted(path.parent.name for path in folder.glob("*/meta.json"))
    except OSError:
        return []


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _target(folder: Path) -> Path:
    """A free folder for a corpus that is made of what is in `folder`."""
    return free(Path("data") / (folder.resolve().name or "mine"))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
