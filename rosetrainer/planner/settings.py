"""Which settings the closed forms know: a config with another one is refused, not half planned."""

from __future__ import annotations

from typing import Any

from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig
from rosetrainer.model_choices import GATED
from rosetrainer.parallel_config import STAGES_PER_RANK
from rosetrainer.validation import ConfigError, unknown_setting

# Fields that change what a step moves or a rank holds, and at which values they are planned.
COUNTED: dict[type, dict[str, tuple[Any, ...] | None]] = {
    GPTConfig: {
        **dict.fromkeys(("vocab_size", "context_length", "n_layers", "n_heads", "d_model")),
        **dict.fromkeys(("d_head", "d_ff", "bias", "tied", "dropout")),
        "token_types": None,
        **dict.fromkeys(("n_kv_heads", "qkv_bias", "dense_bias", "qk_norm", "rotary_fraction")),
        "architecture": ("gpt2", "llama", "bert", "glm", "t5", "transformer_xl"),
        "relative_buckets": None,
        "norm": (None, "rmsnorm", "layernorm", "none"),
        "activation": (None, *GATED, "silu", "gelu", "gelu_tanh", "relu", "relu2"),
    },
    ParallelConfig: {
        **dict.fromkeys(("tp_size", "dp_size", "sequence_parallel", "overlap")),
        **dict.fromkeys(("pp_size", "stages_per_rank", "stage_layers")),
        **dict.fromkeys(("zero", "zero_keep", "dp_replicas")),
        "recompute": ("none", "attention", "block"),
        "pp_schedule": tuple(STAGES_PER_RANK),
    },
    OptimConfig: {
        **dict.fromkeys(("global_batch_size", "micro_batch_size")),
        "optimizer": ("adamw",),
        "freeze": (None,),
    },
}
# Fields that change neither.
WITHOUT_EFFECT: dict[type, tuple[str, ...]] = {
    GPTConfig: (
        *("rotary_base", "rotary_pairs", "norm_eps", "mask_token", "relative_distance"),
        *("start_token", "end_token", "sentinel_token"),
    ),
    ParallelConfig: (),
    OptimConfig: (
        *("learning_rate", "min_lr_ratio", "warmup_steps", "schedule", "stable_ratio"),
        *("weight_decay", "beta1", "beta2", "eps", "grad_clip"),
        *("head_learning_rate", "muon_learning_rate", "muon_momentum"),
    ),
}


def check_settings(*configs: Any) -> None:
    """Raises ConfigError for a setting that the closed forms leave out.

    configs: of the types in COUNTED.
    """
    for config in configs:
        kind = type(config)
        known = COUNTED[kind] | dict.fromkeys(WITHOUT_EFFECT[kind])
        if setting := unknown_setting(config, known):
            raise ConfigError(
                f"plan has no closed form for {setting}; one belongs in "
                "rosetrainer/planner/layout.py, and its name in settings.py beside it"
            )
