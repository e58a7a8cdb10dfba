"""BERT as Hugging Face's library names it: the encoder, and the head that fills in hidden tokens.

What was trained for something else, a pooler or the guess whether two texts follow one another,
has no place here. A folder without the head gives the encoder, and the head begins anew.
"""

from __future__ import annotations

import re
from typing import Any

from rosetrainer.checkpoint.huggingface.source import Source, split_name
from rosetrainer.config import GPTConfig
from rosetrainer.validation import ConfigError, one_of

OURS = "bert"
CLASSES = {"bert": "BertForMaskedLM"}
PREFIX = "bert."
HEAD = "cls.predictions.decoder.weight"
DERIVED = re.compile(r"(bert\.)?embeddings\.position_ids|cls\.predictions\.decoder\.bias")
NO_PLACE = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*")
MAY_LACK = ("output_head.dense", "output_head.norm", "output_head.bias")
OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
BLOCK = {
    "attention.query_key_value": tuple(
        f"attention.self.{one}" for one in ("query", "key", "value")
    ),
    "attention.dense": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward.dense_h_to_4h": ("intermediate.dense",),
    "feed_forward.dense_4h_to_h": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}
OTHERS = {
    "token_embedding": "bert.embeddings.word_embeddings",
    "position_embedding": "bert.embeddings.position_embeddings",
    "token_type_embedding": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "output_head": "cls.predictions",
    "output_head.dense": "cls.predictions.transform.dense",
    "output_head.norm": "cls.predictions.transform.LayerNorm",
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
FIXED = {  # what changes the function, and the value of it that ours computes
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def read_config(theirs: dict[str, Any]) -> GPTConfig:
    """Raises ConfigError for one that Bert does not compute."""
    for key, wanted in FIXED.items():
        if (value := theirs.get(key, wanted)) != wanted:
            raise ConfigError(f"{key}={value!r}, and architecture=bert has {wanted!r}")
    act = theirs.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={act!r} is not supported; it can be {one_of(ACTIVATIONS)}")
    return GPTConfig(
        architecture="bert",
        vocab_size=theirs["vocab_size"],
        context_length=theirs["max_position_embeddings"],
        n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"],
        d_model=theirs["hidden_size"],
        d_ff=theirs["intermediate_size"],
        token_types=theirs["type_vocab_size"],
        norm_eps=theirs.get("layer_norm_eps", 1e-12),
        activation=ACTIVATIONS[act],  # type: ignore[arg-type]
    )


def write_config(config: GPTConfig, model_type: str) -> dict[str, Any]:
    act = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.eps,
        "hidden_act": act.get(config.function, "none"),
        **FIXED,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout),
    }


def source_of(name: str, model_type: str) -> Source:
    """Of which of their tensors ours of this name is made."""
    number, module, leaf = split_name(name)
    if number is None:
        return Source((f"{OTHERS[module]}.{leaf}",))
    return Source(tuple(f"bert.encoder.layer.{number}.{one}.{leaf}" for one in BLOCK[module]))
