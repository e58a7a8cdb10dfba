"""Which settings of a model belong to which architecture, and which mean nothing together.

`config` is a GPTConfig, which is not imported here: its own check asks `check_choices`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args

from rosetrainer.validation import ConfigError, divisors, one_of

CHOICES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("n_kv_heads", "norm", "qkv_bias", "dense_bias", "qk_norm"), ("llama",)),
    **dict.fromkeys(("rotary_fraction", "rotary_pairs"), ("llama",)),
    "norm_eps": ("llama", "bert", "t5"),
    "activation": ("llama", "bert", "t5", "glm"),
    "token_types": ("bert",),
    "mask_token": ("bert", "glm"),
    **dict.fromkeys(("start_token", "end_token"), ("t5", "glm")),
    **dict.fromkeys(("relative_buckets", "relative_distance", "sentinel_token"), ("t5",)),
}
"""Fields that some architectures read, and which; the others have these things fixed."""
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
Activation = Literal[
    "swiglu", "geglu", "geglu_tanh", "reglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"
]


def check_choices(config: Any) -> None:
    """Raises ConfigError for choices that the architecture does not have, or that mean nothing
    together."""
    defaults = {f.name: f.default for f in fields(config)}
    for name, readers in CHOICES.items():
        value = getattr(config, name)
        if config.architecture not in readers and value != defaults[name]:
            raise ConfigError(
                f"{name}={value} is a choice of architecture={one_of(readers)}, and this is "
                f"{config.architecture}; add --architecture {readers[0]}, or leave it out"
            )
    if check := CHECKS.get(config.architecture):
        check(config)
    if config.architecture in ("bert", "glm") and config.activation in GATED:
        plain = one_of(name for name in get_args(Activation) if name not in GATED)
        raise ConfigError(
            f"activation={config.activation} has a gate, and architecture={config.architecture} "
            f"has none; it can be {plain}"
        )


def _check_rotary(config: Any) -> None:
    if config.tied:
        raise ConfigError("architecture=rotary has an output head of its own; add --no-tied")
    if config.head_width % 2:
        raise ConfigError(
            f"architecture=rotary turns pairs, and a head is {config.head_width} wide; "
            f"d_head can be {config.head_width + 1}"
        )


def _check_llama(config: Any) -> None:
    if config.n_heads % config.kv_heads:
        raise ConfigError(
            f"n_heads={config.n_heads} is not divisible by n_kv_heads={config.kv_heads}; "
            f"n_kv_heads can be {one_of(divisors(config.n_heads))}"
        )
    if config.rotary_width % 2 or not config.rotary_width:
        raise ConfigError(
            f"architecture=llama turns pairs, and {config.rotary_width} of a head's "
            f"{config.head_width} features (rotary_fraction={config.rotary_fraction:g}) are none; "
            f"choose d_head x rotary_fraction even"
        )
    if config.bias and (config.qkv_bias or config.dense_bias):
        which = "qkv_bias" if config.qkv_bias else "dense_bias"
        raise ConfigError(f"{which} is for models without the other biases; add --no-bias")
    if config.norm_eps is not None and config.norm not in (None, "rmsnorm"):
        raise ConfigError(f"norm_eps is rmsnorm's, and norm={config.norm}; leave it out")


def _check_bert(config: Any) -> None:
    if not config.bias:
        raise ConfigError("architecture=bert has biases; leave out --no-bias")


def _check_t5(config: Any) -> None:
    if config.bias:
        raise ConfigError("architecture=t5 has no biases; add --no-bias")
    buckets, farthest = config.relative_buckets, config.relative_distance
    if farthest <= buckets // 2:
        raise ConfigError(
            f"relative_distance={farthest} is not above half of relative_buckets={buckets}, "
            f"the distances that have one each; it can be {buckets // 2 + 1} or more"
        )
    if buckets % 4:
        raise ConfigError(
            f"relative_buckets={buckets} is not divisible by 4, the halves ahead and behind by "
            f"the halves near and far; it can be {buckets // 4 * 4 or 4}"
        )


def _check_transformer_xl(config: Any) -> None:
    if config.d_model % 2:
        raise ConfigError(
            f"architecture=transformer_xl has sines and cosines of distances, and "
            f"d_model={config.d_model} is odd; it can be {config.d_model + 1}"
        )


CHECKS = {
    "rotary": _check_rotary,
    "llama": _check_llama,
    "bert": _check_bert,
    "t5": _check_t5,
    "transformer_xl": _check_transformer_xl,
}
