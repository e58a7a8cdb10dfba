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
FILLS = [case for case in CASES if case.startswith("bert")]
"""Fill in tokens, and do not write."""
WRITES = [case for case in CASES if case not in FILLS]


def build(case: str, seed: int = 0) -> Any:
    """In fp32, no bias zero and no norm one."""
    import transformers

    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**settings)
    kinds = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}
    kind = kinds.get(name, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
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
        if type(module).__name__.endswith("RMSNorm"):
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


def computed(model: Any) -> dict[str, Any]:
    """Its logits, loss and gradients by its names; the loss is computed in the logits' dtype."""
    fills = "MaskedLM" in type(model).__name__
    input_ids, mask, labels = batch(fills)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    more = {"token_type_ids": token_types()} if fills else {}
    model.zero_grad()
    logits = model(input_ids, attention_mask=mask, position_ids=positions, **more).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), "gradients": gradients}


def make(case: str, folder: Path) -> Path:
    """Its model, and in float32.pt and float64.pt what that computes; greedy.pt has 20 ids that
    follow three."""
    model = build(case)
    model.save_pretrained(folder)
    torch.save(computed(model), folder / "float32.pt")
    if case in WRITES:
        prompt = batch()[0][:1, :3]
        found = model.generate(
            prompt, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
        torch.save(found, folder / "greedy.pt")
    torch.save(computed(exact(model)), folder / "float64.pt")
    return folder


Made = Callable[[str], Path]
"""The folder of a case, which the first to ask for it makes; the type of the fixture `made`."""
