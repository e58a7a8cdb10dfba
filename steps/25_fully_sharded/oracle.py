"""What the model must compute, one token and one head at a time, and what "equal" means.

No batch, no layer, no mask. It takes the weights by name, so it serves every later step, however
the model is cut.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from config import IGNORED, GPTConfig
from torch import Tensor

Weights = Mapping[str, Tensor]
TOLERANCE = 1e-10  # of the dense tensor's largest value, in float64


@dataclass(frozen=True)
class Masks:
    """What dropout makes of each element: times 0, or times 2**16 / (2**16 - dropped).

    The hash of dropout.py, one element at a time, in Python's integers, which have no sign bit
    and do not wrap around. `row` is the sample, `at` where each of its tokens stands.
    """

    p: float = 0.0
    seed: int = 0
    step: int = 0
    row: int = 0
    at: tuple[int, ...] = ()

    def factor(self, site: str, *place: int) -> float:
        digest = hashlib.sha256(f"{self.seed}:{self.step}:{site}".encode()).digest()
        bits = int.from_bytes(digest[:8], "little")
        for number in (self.row, *place[:-1], place[-1] // 4):
            bits += (number + 1) * 0x9E3779B97F4A7C15
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                bits %= 2**64
                bits = (bits ^ bits >> shift) * factor
        lane = (bits % 2**64 >> 16 * (place[-1] % 4)) % 2**16
        dropped = round(self.p * 2**16)
        return 0.0 if (lane + 2**15) % 2**16 < dropped else 2**16 / (2**16 - dropped)

    def on(self, site: str, x: Tensor, t: int) -> Tensor:
        """x (D), of token t, with dropout."""
        if not self.p:
            return x
        return x * x.new_tensor([self.factor(site, self.at[t], d) for d in range(len(x))])


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return (
        centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(
    config: GPTConfig, query: Tensor, seen: list[tuple[Tensor, Tensor]], masks: Masks, site: str
) -> Tensor:
    """(H*K): what each head of one token makes of the (key, value) that it sees."""
    heads, K = [], config.head_width
    keys, values = (torch.stack(rows) for rows in zip(*seen, strict=True))
    for own in (slice(first, first + K) for first in range(0, len(query), K)):
        probabilities = (keys[:, own] @ query[own] / math.sqrt(K)).softmax(0)
        if masks.p:
            *_, t = places = masks.at[: len(seen)]
            factors = [masks.factor(site, own.start // K, t, s) for s in places]
            probabilities = probabilities * probabilities.new_tensor(factors)
        heads.append(probabilities @ values[:, own])
    return torch.cat(heads)


def block(w: Weights, config: GPTConfig, name: str, xs: list[Tensor], masks: Masks) -> list[Tensor]:
    """One transformer block; a token sees itself and what came before it."""
    at, ff = f"{name}.attention", f"{name}.feed_forward"
    fused = [linear(w, f"{at}.query_key_value", norm(w, f"{at}_norm", x)).chunk(3) for x in xs]
    after = []
    for t, x in enumerate(xs):
        seen = [f[1:] for f in fused[: t + 1]]
        heads = attend(config, fused[t][0], seen, masks, f"{at}.dropout")
        x = x + masks.on(f"{at}_dropout", linear(w, f"{at}.dense", heads), t)
        hidden = gelu(linear(w, f"{ff}.dense_h_to_4h", norm(w, f"{ff}_norm", x)))
        after.append(x + masks.on(f"{ff}_dropout", linear(w, f"{ff}.dense_4h_to_h", hidden), t))
    return after


def embed(w: Weights, positions: str, ids: list[int]) -> list[Tensor]:
    table = w["token_embedding.weight"]
    return [table[token] + w[f"{positions}.weight"][t] for t, token in enumerate(ids)]


def naive_logits(w: Weights, config: GPTConfig, ids: list[int], masks: Masks) -> Tensor:
    """(T, V), one token and one head at a time."""
    xs = embed(w, "position_embedding", ids)
    xs = [masks.on("embedding_dropout", x, t) for t, x in enumerate(xs)]
    for layer in range(config.n_layers):
        xs = block(w, config, f"blocks.{layer}", xs, masks)
    return torch.stack([w["token_embedding.weight"] @ norm(w, "final_norm", x) for x in xs])


def naive_loss(
    w: Weights,
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    masks: Masks = Masks(),
) -> tuple[list[Tensor], Tensor]:
    """(logits of each row's tokens, mean loss); padding is cut off before anything is computed."""
    rows, losses = [], []
    for ids, mask, targets in zip(input_ids, attention_mask.bool(), labels, strict=True):
        masks = replace(masks, row=len(rows), at=tuple(mask.nonzero()[:, 0].tolist()))
        rows.append(naive_logits(w, config, ids[mask].tolist(), masks))
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


def worst_difference(ours: Weights, dense: Weights) -> float:
    """The largest difference of all tensors, each held against its own largest value.

    But for the key's third of a bias: it moves no attention weight, so its true gradient is zero
    and what it has is rounding noise. The layer's weight is its measure.
    """
    found = []
    for name, whole in dense.items():
        parts = 3 if name.endswith("query_key_value.bias") else 1
        pairs = zip(*(t.chunk(parts) for t in (ours[name], whole)), strict=True)
        for index, (a, b) in enumerate(pairs):
            scale = dense[name.replace("bias", "weight")] if index == parts - 2 else None
            found.append(difference(name, a, b, scale))
    return max(found)
