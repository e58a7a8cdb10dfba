"""Which of their models a config is, theirs or ours."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rosetrainer.checkpoint.huggingface import bert, gpt2, llama, t5
from rosetrainer.checkpoint.huggingface.folder import CONFIG, read_json, read_their_config
from rosetrainer.checkpoint.run_folder import TOKENIZER
from rosetrainer.config import GPTConfig
from rosetrainer.validation import ConfigError, one_of

FAMILIES: dict[str, ModuleType] = {
    kind: family for family in (gpt2, llama, bert, t5) for kind in family.CLASSES
}
"""By config.json's model_type."""
NAMES = {
    "bos_token_id": ("<|begin_of_text|>", "<s>", "[CLS]", "<|endoftext|>"),
    "eos_token_id": ("<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]"),
    "pad_token_id": ("<pad>", "[PAD]", "<|endoftext|>"),
}


def family_of(model_type: object, where: Path) -> ModuleType:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type={model_type!r} is not supported; it can be {one_of(FAMILIES)}"
        )
    return FAMILIES[model_type]


def model_of(folder: Path) -> GPTConfig:
    """The model of a folder of theirs, without dropout. Raises ConfigError for what is not ours."""
    theirs, where = read_their_config(folder), folder / CONFIG
    family = family_of(theirs.get("model_type"), where)
    try:
        config: GPTConfig = family.read_config(theirs)
        if config.architecture == "bert":
            config = replace(config, mask_token=added_tokens(folder).get("[MASK]"))
        if config.architecture == "t5":
            config = replace(config, sentinel_token=added_tokens(folder).get("<extra_id_0>"))
        config.check()
    except KeyError as error:
        raise ConfigError(f"{where} lacks {error.args[0]}; was it written by hand?") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def added_tokens(folder: Path) -> dict[str, int]:
    """The special tokens in the folder's tokenizer.json and their ids; none without the file."""
    if not (folder / TOKENIZER).exists():
        return {}
    return {one["content"]: one["id"] for one in read_json(folder / TOKENIZER)["added_tokens"]}


def special_ids(folder: Path) -> dict[str, int]:
    """Of a text's begin, end and padding, by what config.json calls them: those of the folder's
    tokenizer.json that are named as is the custom."""
    added = added_tokens(folder)
    named = {name: [added[one] for one in custom if one in added] for name, custom in NAMES.items()}
    return {name: found[0] for name, found in named.items() if found}


def written_as(config: GPTConfig) -> tuple[str, dict[str, Any]]:
    """(model_type, config.json) of the model of theirs that computes what ours does.

    Raises ConfigError if none does: what is written is read again, and must be what it was.
    """
    found: list[tuple[int, list[str]]] = []
    ours = explicit(config)
    alike = {kind: family for kind, family in FAMILIES.items() if family.OURS == ours.architecture}
    for model_type, family in alike.items():
        theirs = {"model_type": model_type, **family.write_config(config, model_type)}
        try:
            back = explicit(family.read_config(theirs))
        except ConfigError:
            continue
        other = [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(back, f.name)]
        if not other:
            return model_type, {"architectures": [family.CLASSES[model_type]], **theirs}
        found.append((len(other), other))
    names = min(found)[1] if found else ["activation"] if alike else ["architecture"]
    settings = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    raise ConfigError(
        f"no model of {one_of(FAMILIES)} computes {settings} of this one, so that their library "
        f"could not read it; `checkpoint export` writes the weights by our names"
    )


def explicit(config: GPTConfig) -> GPTConfig:
    """The config with what its defaults come to, and without what is training's alone."""
    return replace(
        config,
        d_head=config.head_width,
        d_ff=config.ff_width,
        n_kv_heads=config.kv_heads,
        norm=config.norm or "rmsnorm",  # of others than llama the same on both sides
        norm_eps=config.eps,
        activation=config.function,  # type: ignore[arg-type]
        rotary_base=config.rotary_base if config.architecture == "llama" else 0.0,
        dropout=0.0,
        mask_token=None,
        start_token=None,
        end_token=None,
        sentinel_token=None,
    )
