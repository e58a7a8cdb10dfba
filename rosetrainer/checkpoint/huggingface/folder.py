"""A Hugging Face checkpoint on the disk: config.json, safetensors, and what else may lie there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosetrainer.validation import ConfigError, one_line

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError if it cannot be read, or holds no object."""
    try:
        with one_line(f"{path} cannot be read", wanted(path)):
            values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}; was it copied whole?") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold an object, not {type(values).__name__}")
    return values


def wanted(path: Path) -> str:
    return (
        f"give a folder that save_pretrained of Hugging Face's library wrote, with {CONFIG} and "
        f"{ONE_FILE}"
    )


def read_their_config(folder: Path) -> dict[str, Any]:
    """config.json of the folder. Raises ConfigError if it is not that of whole plain weights."""
    if (folder / ADAPTER).exists():
        raise ConfigError(
            f"{folder} is an adapter ({ADAPTER}), the difference to another model; merge it into "
            f"that one (peft's merge_and_unload, then save_pretrained), and give the result"
        )
    theirs = read_json(folder / CONFIG)
    if theirs.get("quantization_config"):
        raise ConfigError(
            f"{folder / CONFIG}: the weights are quantised (quantization_config), and only plain "
            f"ones are read; give the model that they were made from"
        )
    return theirs


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: only its header was read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it."""


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """By their names, as the headers of the folder's files have them. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, for it is no dict
                    view = file.get_slice(name)
                    shape = tuple(view.get_shape())
                    found[name] = Stored(path, name, shape, view.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; was it copied whole?") from None
    return found


def weight_files(folder: Path) -> Sequence[Path]:
    """The safetensors of the folder: one, or those that its index names.

    Raises ConfigError if there are none, or not all that the index names.
    """
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(map(is_plain_name, names.values())):
            raise ConfigError(f"{folder / INDEX} does not name the file of each tensor")
        files = sorted({folder / name for name in names.values()})
        for path in files:
            if not path.is_file():
                raise ConfigError(
                    f"{folder} lacks {path.name}, which {INDEX} names; copy all {len(files)} files"
                )
        return files
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    for name in PICKLES:
        if (folder / name).exists():
            raise ConfigError(
                f"{folder} holds {name}, a pickle, which can run anything when it is read, so it "
                f'is not; make safetensors of it where you trust it: `python -c "from '
                f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
                f".save_pretrained('NEW')\"`, and give NEW"
            )
    raise ConfigError(f"{folder} has no {ONE_FILE} and no {INDEX}; {wanted(folder)}")


def is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
