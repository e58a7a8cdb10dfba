"""Which oracle computes a model, and the settings that the oracles know."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rosetrainer.config import GPTConfig
from rosetrainer.proof.reference import ReferenceGPT
from rosetrainer.proof.reference_bert import ReferenceBert
from rosetrainer.proof.reference_glm import ReferenceGlm
from rosetrainer.proof.reference_llama import GATED, NORMS, PLAIN, ReferenceLlama
from rosetrainer.proof.reference_rotary import ReferenceRotaryGPT
from rosetrainer.proof.reference_t5 import ReferenceT5
from rosetrainer.proof.reference_transformer_xl import ReferenceTransformerXL
from rosetrainer.validation import ConfigError, unknown_setting

ORACLES: dict[str, type[ReferenceGPT]] = {
    "gpt2": ReferenceGPT,
    "rotary": ReferenceRotaryGPT,
    "llama": ReferenceLlama,
    "bert": ReferenceBert,
    "t5": ReferenceT5,
    "glm": ReferenceGlm,
    "transformer_xl": ReferenceTransformerXL,
}
KNOWN: dict[str, tuple[str | None, ...] | None] = {  # the settings that the oracles compute
    **dict.fromkeys(("vocab_size", "context_length", "n_layers", "n_heads", "d_model", "d_head")),
    **dict.fromkeys(("d_ff", "bias", "tied", "dropout", "rotary_base", "rotary_fraction")),
    **dict.fromkeys(("n_kv_heads", "norm_eps", "qkv_bias", "dense_bias", "qk_norm")),
    **dict.fromkeys(("token_types", "mask_token")),
    **dict.fromkeys(("relative_buckets", "relative_distance")),
    **dict.fromkeys(("start_token", "end_token", "sentinel_token")),
    "norm": (None, *NORMS),
    "activation": (None, *GATED, *PLAIN),
    "rotary_pairs": ("halves", "neighbours"),
    "architecture": tuple(ORACLES),
}


def check_oracle(config: GPTConfig) -> None:
    """Raises ConfigError for a setting that no oracle computes."""
    if setting := unknown_setting(config, KNOWN):
        raise ConfigError(
            f"parity has no oracle for {setting}; write it in plain torch in "
            "rosetrainer/proof/reference.py, then name it in KNOWN (oracles.py)"
        )


def build_reference(config: GPTConfig, whole: Mapping[str, Tensor] | None = None) -> ReferenceGPT:
    """The oracle of config.architecture, which has the parameters `whole` of a model of ours.

    Raises ConfigError as check_oracle does, and if it has others than these.
    """
    check_oracle(config)
    dense = ORACLES[config.architecture](config)
    ours = {name: tuple(weight.shape) for name, weight in (whole or dense.state_dict()).items()}
    its = {name: tuple(weight.shape) for name, weight in dense.state_dict().items()}
    for name in ours | its:
        if ours.get(name) != its.get(name):
            raise ConfigError(
                f"{name} is {ours.get(name, 'missing')} in the model and "
                f"{its.get(name, 'missing')} in its oracle, {type(dense).__name__}; teach the "
                "oracle in plain torch what the model does (rosetrainer/proof/)"
            )
    return dense
