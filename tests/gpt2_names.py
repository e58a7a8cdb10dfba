"""The names and shapes of the library's GPT-2, as ours."""

from __future__ import annotations

from torch import Tensor

BLOCK_NAMES = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.dense",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.dense_h_to_4h",
    "mlp.c_proj": "feed_forward.dense_4h_to_h",
}


def rename(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in theirs.items():
        module, leaf = name.removeprefix("transformer.").rsplit(".", 1)
        if module.startswith("h."):
            _, layer, inner = module.split(".", 2)
            tensor = tensor.T if "c_" in inner and leaf == "weight" else tensor
            module = f"blocks.{layer}.{BLOCK_NAMES[inner]}"
        else:
            module = {
                "wte": "token_embedding",
                "wpe": "position_embedding",
                "ln_f": "final_norm",
                "lm_head": "output_head",
            }[module]
        ours[f"{module}.{leaf}"] = tensor
    return ours
