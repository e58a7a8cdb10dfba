"""Models of Hugging Face's library with random weights, as folders, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, T, ROWS = 61, 12, 4
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": V,
    "n_positions": 32,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 56,
    "initializer_range": 0.3,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), None),
}
BERT: dict[str, Any] = {
    **{key: value for key, value in SHAPE.items() if "token" not in key and "key" not in key},
    "type_vocab_size": 3,
    "pad_token_id": None,
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
}
T5: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 40,
    "d_kv": 6,
    "d_ff": 56,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "n_positions": 16,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 3,
    "pad_token_id": 3,
    "eos_token_id": None,
}
# The library's class, and what differs: head sizes that are no power of two, one head of keys and
# values for four ranks, biases, norms of heads, other bases and activations, tied and untied.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "llama": ("Llama", {**SHAPE, "head_dim": 6}),
    "llama-biases-tied": (
        "Llama",
        {
            **SHAPE,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rms_norm_eps": 0.01,
            "hidden_act": "gelu",
        },
    ),
    "llama-attention-bias": (
        "Llama",
        {
            **SHAPE,
            "attention_bias": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "mistral": (
        "Mistral",
        {**SHAPE, "num_key_value_heads": 1, "sliding_window": None, "head_dim": 14},
    ),
    "qwen2": ("Qwen2", {**SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SHAPE, "num_key_value_heads": 1, "head_dim": 6}),
    "glm": (
        "Glm",
        {
            **SHAPE,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "bert": ("Bert", BERT),
    "bert-relu": (
        "Bert",
        {**BERT, "hidden_size": 20, "hidden_act": "relu", "layer_norm_eps": 0.01},
    ),
}
CASES |= {
    "t5": ("T5", T5),
    "t5-1.1": (
        "T5",
        {
            **T5,
            "d_kv": 10,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 0.01,
            "relative_attention_num_buckets": 12,
        },
    ),
}
ODD = {"hidden_size": 35, "num_attention_heads": 1}
ONE_HEAD: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-one-head": ("GPT2", {**GPT2, "n_embd": 35, "n_head": 1}),
    "llama-one-head": ("Llama", {**SHAPE, **ODD, "num_key_value_heads": 1, "head_dim": 14}),
    "bert-one-head": ("Bert", {**BERT, **ODD}),
    "t5-one-head": ("T5", {**T5, "num_heads": 1, "d_kv": 7}),
}
"""Of an odd width where that is possible: which no tp divides."""
WRITES = [case for case in CASES if not case.startswith("bert")]
"""Those that write tokens; the others fill in."""


def build(case: str, seed: int = 0) -> Any:
    """In fp32, no bias zero and no norm one."""
    import transformers

    name, settings = (CASES | ONE_HEAD)[case]
    config = getattr(transformers, f"{name}Config")(**settings)
    kinds = {
        "GPT2": "GPT2LMHeadModel",
        "Bert": "BertForMaskedLM",
        "T5": "T5ForConditionalGeneration",
    }
    kind = kinds.get(name, f"{name}ForCausalLM")
    torch.manual_seed(seed + 3 * (name == "T5"))
    model = getattr(transformers, kind)(config).eval()
    if case == "t5-1.1":  # the library ties what this config says is not
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        if name == "T5":  # large embeddings beside small layers say one token again and again
            model.shared.weight.zero_()
        for parameter_name, parameter in model.named_parameters():
            noise = 0.3 if name == "T5" else 0.1
            if parameter_name.endswith(("Attention.q.weight", "Attention.k.weight")):
                noise = 0.0  # T5's scores are not scaled down, so that fp32 soon is not enough
            parameter.add_(torch.randn_like(parameter) * noise)
        if (
            name == "T5" and model.config.scale_decoder_outputs
        ):  # or a scaled head says next to nothing
            model.decoder.final_layer_norm.weight.mul_(3)
    return model


def exact_norm(self: Any, x: Tensor) -> Tensor:
    variance = x.square().mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


def exact_turning(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    width = 2 * len(self.inv_freq)
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    speeds = self.config.rope_parameters["rope_theta"] ** (-pairs / width)
    angles = position_ids[..., None] * speeds
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def exact(model: nn.Module) -> nn.Module:
    """In float64, also where the library computes in fp32 inside."""
    for module in model.double().modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.forward = MethodType(exact_norm, module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = MethodType(exact_turning, module)
    return model


def batch(fills: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, mask, labels), (ROWS, T) each: padded left in row 1 and right in row 2.

    Where a model fills in tokens, the last one before padding has a label too.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids, labels = torch.randint(V, (2, ROWS, T), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, :5] = mask[2, 8:] = 0
    labels[mask == 0] = labels[2, 7 + fills :] = labels[3, 2:6] = -100
    return input_ids, mask, labels


def token_types() -> Tensor:
    """(ROWS, T): the kinds of a BERT's tokens."""
    return torch.randint(3, (ROWS, T), generator=torch.Generator().manual_seed(2))


def targets() -> tuple[Tensor, Tensor, Tensor]:
    """(target_ids, mask, labels), (ROWS, 8) each, for a source: padded left and right."""
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(V, (2, ROWS, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[3, 5:] = 0
    labels[mask == 0] = labels[2, 1:4] = -100
    return ids, mask, labels


def their_inputs(model_type: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the library's model is called with, and labels."""
    input_ids, mask, labels = batch(model_type == "bert")
    found = {"input_ids": input_ids, "attention_mask": mask}
    if model_type == "t5":
        ids, target_mask, labels = targets()
        return {**found, "decoder_input_ids": ids, "decoder_attention_mask": target_mask}, labels
    found["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return found | ({"token_type_ids": token_types()} if model_type == "bert" else {}), labels


def our_inputs(model_type: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor]:
    """What ours is called with, and which logits mean something."""
    input_ids, mask, labels = batch(model_type == "bert")
    if model_type == "t5":
        ids, target_mask, labels = targets()
        return (input_ids, mask, ids, labels), {"target_mask": target_mask}, target_mask == 1
    more = {"token_types": token_types()} if model_type == "bert" else {}
    return (input_ids, mask, labels), more, mask == 1


def computed(model: Any) -> dict[str, Any]:
    """Its logits, loss and gradients by its names; the loss is computed in the logits' dtype."""
    inputs, labels = their_inputs(model.config.model_type)
    model.zero_grad()
    logits = model(**inputs).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), "gradients": gradients}


def tokens_of(case: str) -> int:
    """How many are written greedily; but for a table of positions more than a context holds."""
    return {"gpt2": 20, "t5": 24}.get(case.partition("-")[0], 40)


def make(case: str, folder: Path) -> Path:
    """Its model, and in float32.pt and float64.pt what that computes; greedy.pt has 20 ids that
    follow three."""
    model = build(case)
    model.save_pretrained(folder)
    torch.save(computed(model), folder / "float32.pt")
    if case in WRITES:
        prompt = batch()[0][:1, :3]
        found = model.generate(
            prompt,
            max_new_tokens=tokens_of(case),
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
        torch.save(found, folder / "greedy.pt")
    torch.save(computed(exact(model)), folder / "float64.pt")
    return folder


Made = Callable[[str], Path]
"""The folder of a case, which the first to ask for it makes; the type of the fixture `made`."""
