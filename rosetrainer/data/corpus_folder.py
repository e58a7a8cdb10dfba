"""The folder that a corpus goes to: what may be replaced, and how it is written whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosetrainer.durable_files import sha256_of, sync_folder
from rosetrainer.validation import ConfigError, one_line

OURS = {"meta.json", "train.bin", "val.bin", "tokenizer.json"}


def must_make(out: Path, source: str, options: dict[str, Any], force: bool) -> bool:
    """False, and prints so, if `out` holds this very corpus, undamaged.

    Raises ConfigError if `out` holds what must not be replaced.
    """
    meta = _existing(out)
    if meta is None or force:
        return True
    if meta["source"] != source or meta["options"] != options:
        held = {"source": meta["source"], **meta["options"]}
        wanted = {"source": source, **options}
        differing = [k for k in {**wanted, **held} if held.get(k) != wanted.get(k)]
        difference = ", ".join(f"{k}={held.get(k)!r}, not {wanted.get(k)!r}" for k in differing)
        raise ConfigError(
            f"{out} holds a corpus with {difference}; add --force to replace it, or give "
            "another --out"
        )
    for name, digest in meta["sha256"].items():
        if _digest(out / name) != digest:
            print(f"{out / name} is damaged; making it again")
            return True
    print(f"{out}: {summary(meta)}, whole already; --force makes it again")
    return False


def _existing(out: Path) -> dict[str, Any] | None:
    """meta.json of the corpus in out, None if out is not there or empty.

    Raises ConfigError if out holds anything else: only a corpus of ours is ever replaced.
    """
    with one_line(f"cannot use {out}", "give another --out"):
        names = set(os.listdir(out)) if out.exists() else set()
    if not names:
        return None
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        ours = all(isinstance(meta[key], dict) for key in ("options", "sha256"))
        ours = ours and {"train.bin", "val.bin"} <= set(meta["sha256"]) <= OURS
        summary(meta).encode()  # an error where it lacks a key, or holds what ours does not
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    strange = sorted(names - OURS)
    if strange or not ours:
        what = strange[0] if strange else "files but no meta.json of ours"
        raise ConfigError(
            f"{out} holds {what}, which this command did not write and does not replace; "
            "give another --out"
        )
    return dict(meta)


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return "unreadable"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which then takes out's place: whole, or not at all.

    The caller has asked `must_make`. Raises ConfigError if the disk is full, say.
    """
    out = Path(os.path.realpath(out))  # a link to a folder stays a link
    new, old = (out.parent / f".{out.name}-{word}-{os.getpid()}" for word in ("new", "old"))
    try:
        with one_line(f"cannot write {out}", "make room, or give another --out"):
            new.mkdir(parents=True)
            yield new
            for path in new.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(new)
            if out.exists():
                out.rename(old)
            new.rename(out)
            sync_folder(out.parent)
    finally:  # an interrupt passes here too
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def summary(meta: dict[str, Any]) -> str:
    """What a corpus is, in a few words."""
    made_with = f" of {meta['python']}" if meta.get("python") else ""
    floor = f", floor {meta['floor_nats']:.4f} nats" if meta.get("floor_nats") else ""
    documents = meta.get("documents")
    of = f" of {documents['train']} + {documents['val']} documents" if documents else ""
    size = 2 * (meta["train_tokens"] + meta["val_tokens"])
    return (
        f"{meta['source']}{made_with}, {meta['train_tokens']} + {meta['val_tokens']} tokens{of} "
        f"({meta['tokenizer']}, vocab_size {meta['vocab_size']}, {size} bytes){floor}"
    )
