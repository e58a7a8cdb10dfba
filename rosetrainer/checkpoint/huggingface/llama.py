"""Llama and the models that Hugging Face's library keeps beside it, all ours by choices.

Mistral is Llama by another name; Qwen2 has biases of q, k and v; Qwen3 norms of queries and keys;
GLM-4 turns neighbouring pairs of a part of each head, and its file has gate and up as one tensor.
"""

from __future__ import annotations

import re
from typing import Any

from rosetrainer.checkpoint.huggingface.source import NOTHING, Source, split_name
from rosetrainer.config import GPTConfig
from rosetrainer.validation import ConfigError, one_of

OURS = "llama"
CLASSES = {  # of two that compute the same the first is written
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "glm": "GlmForCausalLM",
}
PREFIX = "model."
HEAD = "lm_head.weight"
DERIVED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
NO_PLACE, MAY_LACK, OLD = NOTHING, (), dict[str, str]()
ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "glm": 2}  # where config.json says nothing
HEAD_WIDTH = {"qwen3": 128, "glm": 128}
EPS = {"glm": 1.5625e-07}
BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.query": ("self_attn.q_proj",),
    "attention.key_value": ("self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
    "attention.dense": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
OTHERS = {
    "token_embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "output_head": "lm_head",
}


def read_config(theirs: dict[str, Any]) -> GPTConfig:
    """Raises ConfigError for one that Llama does not compute."""
    kind, heads = theirs["model_type"], theirs["num_attention_heads"]
    check_window(theirs)
    act = theirs.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={act!r} is not supported; it can be {one_of(ACTIVATIONS)}")
    qkv, dense, inner = biases(theirs)
    if inner and not (qkv and dense):
        raise ConfigError("mlp_bias without attention_bias is not supported")
    base, fraction = rotary(theirs)
    kv_heads, width = theirs.get("num_key_value_heads"), theirs.get("head_dim")
    return GPTConfig(
        architecture="llama",
        vocab_size=theirs["vocab_size"],
        context_length=theirs.get("max_position_embeddings", 2048),
        n_layers=theirs["num_hidden_layers"],
        n_heads=heads,
        d_model=theirs["hidden_size"],
        d_head=HEAD_WIDTH.get(kind, theirs["hidden_size"] // heads) if width is None else width,
        d_ff=theirs["intermediate_size"],
        n_kv_heads=KV_HEADS.get(kind, heads) if kv_heads is None else kv_heads,
        norm="rmsnorm",
        norm_eps=theirs.get("rms_norm_eps", EPS.get(kind, 1e-6)),
        activation=ACTIVATIONS[act],  # type: ignore[arg-type]
        bias=inner,
        qkv_bias=qkv and not inner,
        dense_bias=dense and not inner,
        qk_norm=kind == "qwen3",
        tied=theirs.get("tie_word_embeddings", False),
        rotary_base=base,
        rotary_fraction=fraction,
        rotary_pairs="neighbours" if kind == "glm" else "halves",
    )


def biases(theirs: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether q, k and v, attention's output, and the feed-forward layer have biases."""
    kind = theirs["model_type"]
    if kind in ("mistral", "qwen2"):
        return kind == "qwen2", False, False
    qkv = bool(theirs.get("attention_bias", kind == "glm"))
    return qkv, qkv and kind != "glm", kind == "llama" and bool(theirs.get("mlp_bias", False))


def rotary(theirs: dict[str, Any]) -> tuple[float, float]:
    """The base, and the share of a head that turns; version 4 of the library wrote them apart."""
    given = theirs.get("rope_parameters") or {}
    scaling = {**(theirs.get("rope_scaling") or {}), **given}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope_type={kind!r} is not supported; only plain rotary positions are")
    base = given.get("rope_theta", theirs.get("rope_theta", 10000.0))
    if theirs["model_type"] != "glm":
        return base, 1.0
    return base, given.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 0.5))


def check_window(theirs: dict[str, Any]) -> None:
    """Raises ConfigError if attention is cut to a window shorter than the context."""
    default = 4096 if theirs["model_type"] == "mistral" else None
    window = theirs.get("sliding_window", default)
    used = theirs["model_type"] == "mistral" or theirs.get("use_sliding_window", False)
    length = theirs.get("max_position_embeddings", 2048)
    if used and window is not None and window < length:
        raise ConfigError(
            f"sliding_window={window} is below max_position_embeddings={length}, and attention to "
            f"a window is not supported; with max_position_embeddings at most {window} the model "
            f"is a plain one"
        )


def write_config(config: GPTConfig, model_type: str) -> dict[str, Any]:
    """As the library writes it; of choices that this model does not have nothing is said."""
    act = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    turns = {"partial_rotary_factor": config.rotary_fraction} if model_type == "glm" else {}
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.d_model,
        "head_dim": config.head_width,
        "intermediate_size": config.ff_width,
        "hidden_act": act.get(config.function, "none"),
        "rms_norm_eps": config.eps,
        "attention_bias": config.bias or config.qkv_bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base, **turns},
        "rope_theta": config.rotary_base,  # where version 4 looks for it
        **turns,
    } | ({"sliding_window": None} if model_type == "mistral" else {})


def source_of(name: str, model_type: str) -> Source:
    """Of which of their tensors ours of this name is made."""
    number, module, leaf = split_name(name)
    if number is None:
        return Source((f"{OTHERS[module]}.{leaf}",))
    names = BLOCK[module]
    if module == "feed_forward.gate_up" and model_type == "glm":
        names = ("mlp.gate_up_proj",)
    return Source(tuple(f"model.layers.{number}.{one}.{leaf}" for one in names))
