"""GPT-2 as Hugging Face's library names it. Its linear layers stand transposed in the file."""

from __future__ import annotations

import re
from typing import Any

from rosetrainer.checkpoint.huggingface.source import NOTHING, Source, split_name
from rosetrainer.config import GPTConfig
from rosetrainer.validation import ConfigError, one_of

OURS = "gpt2"
CLASSES = {"gpt2": "GPT2LMHeadModel"}
PREFIX = "transformer."
HEAD = "lm_head.weight"
DERIVED = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
"""Masks, which old versions of the library saved."""
NO_PLACE, MAY_LACK, OLD = NOTHING, (), dict[str, str]()
BLOCK = {
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.dense": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.dense_h_to_4h": "mlp.c_fc",
    "feed_forward.dense_4h_to_h": "mlp.c_proj",
}
OTHERS = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "output_head": "lm_head",
}
FIXED = {  # what changes the function, and the values of it that ours computes
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def read_config(theirs: dict[str, Any]) -> GPTConfig:
    """Raises ConfigError for one that GPTModel does not compute."""
    for key, values in FIXED.items():
        if (value := theirs.get(key, values[0])) not in values:
            raise ConfigError(f"{key}={value!r}, and architecture=gpt2 has {one_of(values)}")
    inner = theirs.get("n_inner")
    return GPTConfig(
        vocab_size=theirs["vocab_size"],
        context_length=theirs["n_positions"],
        n_layers=theirs["n_layer"],
        n_heads=theirs["n_head"],
        d_model=theirs["n_embd"],
        d_ff=4 * theirs["n_embd"] if inner is None else inner,
        tied=theirs.get("tie_word_embeddings", True),
    )


def write_config(config: GPTConfig, model_type: str) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.d_model,
        "n_inner": config.ff_width,
        "tie_word_embeddings": config.tied,
        **{key: values[0] for key, values in FIXED.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def source_of(name: str, model_type: str) -> Source:
    """Of which of their tensors ours of this name is made."""
    number, module, leaf = split_name(name)
    if number is None:
        return Source((f"{OTHERS[module]}.{leaf}",))
    theirs = BLOCK[module]
    return Source((f"transformer.h.{number}.{theirs}.{leaf}",), leaf == "weight" and "c_" in theirs)
