"""What the model must compute, one token and one head at a time, and what "equal" means.

No batch, no layer, no mask. It takes the weights by name, so it serves every later step, however
the model is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from config import IGNORED, GPTConfig
from torch import Tensor

TOLERANCE = 1e-10  # of the dense tensor's largest value, in float64


def naive_logits(w: Mapping[str, Tensor], config: GPTConfig, ids: list[int]) -> Tensor:
    """(T, V), one token, one head, one earlier token at a time."""

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        scaled = centred / torch.sqrt((centred**2).mean() + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        scores = [queries @ key / math.sqrt(len(key)) for key in keys]
        shares = torch.stack(scores).softmax(0)
        return sum(share * value for share, value in zip(shares, values, strict=True))

    embedded = zip(ids, w["position_embedding.weight"], strict=False)
    xs = [w["token_embedding.weight"][token] + position for token, position in embedded]
    for layer in range(config.n_layers):
        at, ff = f"blocks.{layer}.attention", f"blocks.{layer}.feed_forward"
        fused = [linear(f"{at}.query_key_value", norm(f"{at}_norm", x)) for x in xs]
        # By position, then q, k or v, then head.
        parts = [[p.split(config.head_width) for p in f.chunk(3)] for f in fused]
        for t, x in enumerate(xs):
            seen = parts[: t + 1]
            heads = [
                attend(parts[t][0][h], [s[1][h] for s in seen], [s[2][h] for s in seen])
                for h in range(config.n_heads)
            ]
            x = x + linear(f"{at}.dense", torch.cat(heads))
            hidden = gelu(linear(f"{ff}.dense_h_to_4h", norm(f"{ff}_norm", x)))
            xs[t] = x + linear(f"{ff}.dense_4h_to_h", hidden)
    return torch.stack([w["token_embedding.weight"] @ norm("final_norm", x) for x in xs])


def naive_loss(
    w: Mapping[str, Tensor],
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """(logits of each row's tokens, mean loss); padding is cut off before anything is computed."""
    rows, losses = [], []
    for ids, mask, targets in zip(input_ids, attention_mask.bool(), labels, strict=True):
        rows.append(naive_logits(w, config, ids[mask].tolist()))
        # The last token before padding has nothing to predict: what follows it is no token.
        followed = torch.cat([mask[1:], mask[-1:]])[mask]
        told = zip(rows[-1].log_softmax(-1), targets[mask], followed, strict=True)
        losses += [-row[target] for row, target, real in told if real and target != IGNORED]
    return rows, torch.stack(losses).mean()


def difference(name: str, ours: Tensor, dense: Tensor, scale: Tensor | None = None) -> float:
    """max|ours - dense|. Raises AssertionError above the tolerance, and where shapes differ."""
    assert ours.shape == dense.shape, f"{name} is {tuple(ours.shape)}, not {tuple(dense.shape)}"
    worst = (ours - dense).abs().max().item()
    largest = (dense if scale is None else scale).abs().max()
    assert worst <= TOLERANCE * largest, f"{name} differs by {worst:.1e}"
    return worst


def worst_difference(ours: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> float:
    """The largest difference of all tensors, each held against its own largest value.

    But for the key's third of a bias: it moves no attention weight, so its true gradient is zero
    and what it has is rounding noise. The layer's weight is its measure.
    """
    found = []
    for name, whole in dense.items():
        fused = name.endswith("query_key_value.bias")
        thirds = zip(*(t.chunk(3 if fused else 1) for t in (ours[name], whole)), strict=True)
        for index, (a, b) in enumerate(thirds):
            scale = dense[name.replace("bias", "weight")] if index == 1 else None
            found.append(difference(name, a, b, scale))
    return max(found)
