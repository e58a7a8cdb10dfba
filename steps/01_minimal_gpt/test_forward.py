"""The model against a naive loop with the same weights, and what a future token may move.

python test_forward.py
"""

from __future__ import annotations

import math

import torch
from config import GPTConfig
from model import GPTModel, init_weights
from torch import Tensor

TOLERANCE = 1e-10  # of the largest value, in float64


def random_model(config: GPTConfig) -> GPTModel:
    """In float64, with biases that are not zero and norms that are not one."""
    model = GPTModel(config).double()
    init_weights(model, seed=1)
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def naive_logits(model: GPTModel, ids: list[int]) -> Tensor:
    """(T, V), one token, one head, one earlier token at a time; no batch, no mask."""
    w, config = dict(model.named_parameters()), model.config

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
        probabilities = torch.stack(scores).softmax(0)
        return sum(p * value for p, value in zip(probabilities, values, strict=True))

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


def main() -> None:
    config = GPTConfig(vocab_size=11, context_length=8, n_heads=4, d_model=24, d_head=5, d_ff=40)
    model = random_model(config)
    input_ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = -100
    logits, loss = model(input_ids, labels=labels)
    naive = torch.stack([naive_logits(model, ids) for ids in input_ids.tolist()])
    difference = (logits - naive).abs().max().item()
    print(f"world_size: 1\ninput_ids shape: {tuple(input_ids.shape)}")
    print(f"logits shape: {tuple(logits.shape)}\nloss: {loss.item():.6f}")
    print(f"max diff vs dense: {difference:.1e}")
    assert difference <= TOLERANCE * naive.abs().max(), f"logits differ by {difference:.1e}"

    expected = -naive.log_softmax(-1)[:, :-1].gather(-1, labels[:, :-1, None]).mean()
    assert abs(loss - expected) <= TOLERANCE, f"the loss is {loss}, expected {expected}"

    print("logits that move when token k changes (rows: k, columns: position)")
    before = model(input_ids[:1])[0]
    for k in range(input_ids.shape[1]):
        changed = input_ids[:1].clone()
        changed[0, k] = (changed[0, k] + 1) % config.vocab_size
        moved = (model(changed)[0] != before).any(-1)[0].tolist()
        print("  " + " ".join("x" if m else "." for m in moved))
        assert moved == [t >= k for t in range(len(moved))], f"token {k}"


if __name__ == "__main__":
    main()
