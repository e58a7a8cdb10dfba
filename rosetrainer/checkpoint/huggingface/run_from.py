"""A run folder of ours out of a folder of theirs: a checkpoint of step 0, read tensor by tensor."""

from __future__ import annotations

import math
import secrets
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rosetrainer.checkpoint.huggingface.load import Weights
from rosetrainer.checkpoint.manifest import Progress
from rosetrainer.checkpoint.run_folder import CONFIG, META, TOKENIZER
from rosetrainer.checkpoint.safetensors_file import Entry, write_safetensors
from rosetrainer.checkpoint.slices import Draft
from rosetrainer.config import GPTConfig, RunConfig, TrainConfig
from rosetrainer.data.batches import Corpus
from rosetrainer.data.bpe import BPETokenizer, find_tokenizer
from rosetrainer.durable_files import write_json
from rosetrainer.validation import ConfigError


def write_run(out: Path, weights: Weights, model: GPTConfig) -> str:
    """Fills the new folder `out`; a line on the tokenizer. All numbers become fp32."""
    config = TrainConfig(model=model, run=RunConfig(init_from=weights.folder.absolute()))
    meta, remark = tokens_of(weights.folder, model.vocab_size)
    write_json(out / CONFIG, asdict(config))
    write_json(out / META, meta)
    if meta["tokenizer"] == "bpe":
        shutil.copyfile(weights.folder / TOKENIZER, out / TOKENIZER)
    entries = [Entry(name, spec.shape, torch.float32) for name, spec in weights.specs.items()]
    slices = {
        entry.name: {
            "shape": list(entry.shape),
            "dtype": "float32",
            "first": [0] * len(entry.shape),
            "size": list(entry.shape),
        }
        for entry in entries
    }
    draft = Draft(out, step=0, attempt=secrets.token_hex(4))
    tensors = (weights.read_whole(entry.name) for entry in entries)
    write = partial(write_safetensors, entries=entries, tensors=tensors, metadata={})
    draft.write_file(0, write, slices, sum(4 * math.prod(entry.shape) for entry in entries))
    started = {"step": 0, "updates": 0, "skipped": 0, "tokens_seen": 0}
    draft.complete(1, Progress(**started, dtype="float32", data={}, config=config))
    return remark


def tokens_of(folder: Path, vocab_size: int) -> tuple[dict[str, Any], str]:
    """The meta.json by which a run's tokens are read, and what a user should know about it."""
    ids = {"tokenizer": "ids", "vocab_size": vocab_size}
    path, numbers = folder / TOKENIZER, "prompts and texts of this run are numbers"
    if not path.exists():
        return ids, f"{folder} has no {TOKENIZER}: {numbers}"
    try:
        tokenizer = BPETokenizer.load(path)
    except ConfigError as error:
        return ids, f"{error}: {numbers}"
    known = tokenizer.vocab_size
    if known > vocab_size:
        return ids, f"{path} has {known} tokens and the model {vocab_size}: {numbers}"
    end = tokenizer.end_of_text
    return {"tokenizer": "bpe", "vocab_size": known, "end_of_text": end}, ""


def check_tokens(folder: Path, vocab_size: int, corpus: Corpus) -> None:
    """Raises ConfigError unless the corpus holds the tokens of the folder's model.

    That may have more ids than its tokenizer, for an even size: no text has these.
    """
    has, wants = corpus.meta.vocab_size, vocab_size
    if has < wants and folder.exists():
        path = find_tokenizer(str(folder))
        wants = BPETokenizer.load(path).vocab_size if path else wants
    if has > wants or (has < wants and folder.exists()):
        raise ConfigError(
            f"{corpus.folder} has {has} token ids, and the model of {folder} {wants}; make a "
            f"corpus by its tokenizer: prepare file PATH... --tokenizer {folder}"
        )
