"""T5, of the first version and of 1.1, as Hugging Face's library names it.

The table of distances lies in the first block of each side. A head of the first version is the
token embedding, and scaled; that of 1.1 is neither.
"""

from __future__ import annotations

import re
from typing import Any

from rosetrainer.checkpoint.huggingface.source import Source, split_name
from rosetrainer.config import GPTConfig
from rosetrainer.validation import ConfigError, one_of

OURS = "t5"
CLASSES = {"t5": "T5ForConditionalGeneration"}
PREFIX = "transformer."
HEAD = "lm_head.weight"
DERIVED = re.compile(r"(encoder|decoder)\.embed_tokens\.weight")
CROSS_TABLE = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
NO_PLACE, MAY_LACK, OLD = re.compile(CROSS_TABLE), (), dict[str, str]()
"""The first files had a table of distances for cross-attention, which never read it."""
SELF, CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
BLOCK = {
    "attention_norm": ("layer.0.layer_norm",),
    "attention.query": (f"{SELF}.q",),
    "attention.key_value": (f"{SELF}.k", f"{SELF}.v"),
    "attention.dense": (f"{SELF}.o",),
    "cross_attention_norm": ("layer.1.layer_norm",),
    "cross_attention.query": (f"{CROSS}.q",),
    "cross_attention.key_value": (f"{CROSS}.k", f"{CROSS}.v"),
    "cross_attention.dense": (f"{CROSS}.o",),
}
FEED_FORWARD = {  # behind "layer.1." of an encoder's block, "layer.2." of a decoder's
    "feed_forward_norm": ("layer_norm",),
    "feed_forward.dense_h_to_4h": ("DenseReluDense.wi",),
    "feed_forward.dense_4h_to_h": ("DenseReluDense.wo",),
    "feed_forward.gate_up": ("DenseReluDense.wi_0", "DenseReluDense.wi_1"),
    "feed_forward.down": ("DenseReluDense.wo",),
}
OTHERS = {
    "token_embedding": "shared",
    "encoder_norm": "encoder.final_layer_norm",
    "final_norm": "decoder.final_layer_norm",
    "encoder_bias": f"encoder.block.0.{SELF}.relative_attention_bias",
    "decoder_bias": f"decoder.block.0.{SELF}.relative_attention_bias",
    "output_head": "lm_head",
}
ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
}


def read_config(theirs: dict[str, Any]) -> GPTConfig:
    """Raises ConfigError for one that T5 does not compute."""
    act, layers = theirs.get("feed_forward_proj", "relu"), theirs["num_layers"]
    if act not in ACTIVATIONS:
        raise ConfigError(
            f"feed_forward_proj={act!r} is not supported; it can be {one_of(ACTIVATIONS)}"
        )
    if (decoder := theirs.get("num_decoder_layers") or layers) != layers:
        raise ConfigError(f"num_decoder_layers={decoder} and num_layers={layers} must be equal")
    tied = theirs.get("tie_word_embeddings", True)
    return GPTConfig(
        architecture="t5",
        vocab_size=theirs["vocab_size"],
        context_length=theirs.get("n_positions", 512),
        n_layers=layers,
        n_heads=theirs["num_heads"],
        d_model=theirs["d_model"],
        d_head=theirs["d_kv"],
        d_ff=theirs["d_ff"],
        bias=False,
        norm_eps=theirs.get("layer_norm_epsilon", 1e-6),
        activation=ACTIVATIONS[act],  # type: ignore[arg-type]
        relative_buckets=theirs.get("relative_attention_num_buckets", 32),
        relative_distance=theirs.get("relative_attention_max_distance", 128),
        tied=theirs.get("scale_decoder_outputs", tied),  # version 5 always says that it is tied
        start_token=theirs.get("decoder_start_token_id"),
        end_token=theirs.get("eos_token_id"),
    )


def write_config(config: GPTConfig, model_type: str) -> dict[str, Any]:
    act = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    ids = {
        "decoder_start_token_id": config.start_token,
        "pad_token_id": config.start_token,
        "eos_token_id": config.end_token,
    }
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "num_layers": config.n_layers,
        "num_decoder_layers": config.n_layers,
        "num_heads": config.n_heads,
        "d_model": config.d_model,
        "d_kv": config.head_width,
        "d_ff": config.ff_width,
        "layer_norm_epsilon": config.eps,
        "feed_forward_proj": act.get(config.function, "none"),
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tied,
        "is_encoder_decoder": True,
        **{key: value for key, value in ids.items() if value is not None},
    }


def source_of(name: str, model_type: str) -> Source:
    """Of which of their tensors ours of this name is made."""
    side = "encoder" if name.startswith("encoder.") else "decoder"
    number, module, leaf = split_name(name.replace("encoder.", "blocks.", 1))
    if number is None:
        return Source((f"{OTHERS[module]}.{leaf}",))
    last = {"encoder": 1, "decoder": 2}[side]
    inner = BLOCK.get(module) or [f"layer.{last}.{one}" for one in FEED_FORWARD[module]]
    return Source(tuple(f"{side}.block.{number}.{one}.{leaf}" for one in inner))
