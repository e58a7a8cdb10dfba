"""How many parameters a model has, and whether this machine can hold them: before it is built.

`config` is a GPTConfig, which is not imported here: its own check asks `check_exists`.
"""

from __future__ import annotations

import os
from typing import Any

from rosetrainer.validation import ConfigError

LARGEST = 2**50
"""Parameters; a thousand times those of the largest known models."""


def parameter_count(config: Any) -> int:
    """Of the whole model, the vocabulary without its pad."""
    if config.architecture == "llama":
        return _parameters_of_llama(config)
    if config.architecture == "t5":
        return _parameters_of_t5(config)
    D, F, width = config.d_model, config.ff_width, config.n_heads * config.head_width
    norm = (config.architecture != "rotary") * D * (1 + config.bias)
    block = 4 * D * width + 2 * D * F + 2 * norm + config.bias * (3 * width + F + 2 * D)
    if config.architecture == "transformer_xl":  # the projection of distances, two biases
        block += (D + 2) * width
    tables = config.vocab_size * D * (1 + (not config.tied))
    tables += config.has_position_table * config.context_length * D
    if config.architecture == "glm":  # whose positions have a second dimension
        tables += config.context_length * D
    if config.architecture == "bert":  # its transform before the output head, and its bias
        tables += config.token_types * D + D * (D + 1) + norm + config.vocab_size
    return tables + config.n_layers * block + norm


def _parameters_of_llama(config: Any) -> int:
    D, F, K = config.d_model, config.ff_width, config.head_width
    queries, fused = config.n_heads * K, (config.n_heads + 2 * config.kv_heads) * K
    norm = D * {"layernorm": 1 + config.bias, "none": 0}.get(config.norm, 1)
    columns = F * (1 + config.is_gated)
    block = D * (fused + queries + columns + F) + 2 * norm + 2 * K * config.qk_norm
    block += config.bias * (columns + D)
    block += (config.bias or config.qkv_bias) * fused + (config.bias or config.dense_bias) * D
    return config.vocab_size * D * (1 + (not config.tied)) + config.n_layers * block + norm


def _parameters_of_t5(config: Any) -> int:
    D, F, width = config.d_model, config.ff_width, config.n_heads * config.head_width
    feed_forward = D * F * (2 + config.is_gated)
    blocks = 2 * (4 * D * width + feed_forward) + 4 * D * width + 5 * D  # one of each side
    tables = config.vocab_size * D * (1 + (not config.tied))
    biases = 2 * config.relative_buckets * config.n_heads
    return tables + config.n_layers * blocks + biases + 2 * D


def check_exists(config: Any) -> None:
    """Raises ConfigError for sizes beyond any machine of today."""
    count = parameter_count(config)
    if count > LARGEST:
        names = ("n_layers", "n_heads", "d_model", "context_length", "vocab_size")
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        raise ConfigError(
            f"{sizes}, d_head={config.head_width} and d_ff={config.ff_width} make {count:.1e} "
            f"parameters; they can be {LARGEST:,} at most"
        )


def check_memory(config: Any, bytes_each: float, what: str, copies: float = 1.0) -> None:
    """Raises ConfigError if `copies` of the model do not fit into this machine's memory.

    bytes_each: of one parameter, with what is held beside it; `what` says what that is. copies:
    what the ranks of this machine hold together, below 1 where those of other machines hold a part.
    """
    count, memory = parameter_count(config), machine_memory()
    need = count * bytes_each * copies
    if need > memory:
        raise ConfigError(
            f"the model's {count:,} parameters take {need / 2**30:,.1f} GiB here, for {what}, and "
            f"this machine has {memory / 2**30:,.1f} GiB of memory; try a smaller model"
        )


def machine_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
