"""The model against a naive loop; the first loss, the last loss, and the floor under them.

python test_forward.py
"""

from __future__ import annotations

import math

import torch
from config import IGNORED, GPTConfig
from model import GPTModel, init_weights
from oracle import difference, naive_loss, worst_difference
from torch import Tensor
from train import train

from data import MarkovCorpus, shifted


def random_model(config: GPTConfig) -> GPTModel:
    """In float64, with biases that are not zero and norms that are not one."""
    model = GPTModel(config).double()
    init_weights(model, seed=1)
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def check_model(config: GPTConfig, input_ids: Tensor, mask: Tensor) -> GPTModel:
    """Logits, loss and every gradient, with padding at both ends of a row."""
    model = random_model(config)
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORED
    logits, loss = model(input_ids, mask, labels)
    loss.backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    naive, naive_mean = naive_loss(weights, config, input_ids, mask, labels)
    naive_mean.backward()

    print(f"world_size: 1\ninput_ids shape: {tuple(input_ids.shape)}")
    print(f"logits shape: {tuple(logits.shape)}\nloss: {loss.item():.6f}")
    ours = logits[mask.bool()]
    print(f"max diff vs dense: {difference('logits', ours, torch.cat(naive)):.1e}")
    difference("loss", loss, naive_mean)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    worst = worst_difference(gradients, {n: w.grad for n, w in weights.items()})
    print(f"max grad diff vs dense: {worst:.1e}")
    return model


def check_causality(model: GPTModel, input_ids: Tensor) -> None:
    print("logits that move when token k changes (rows: k, columns: position)")
    before = model(input_ids[:1])[0]
    for k in range(input_ids.shape[1]):
        changed = input_ids[:1].clone()
        changed[0, k] = (changed[0, k] + 1) % model.config.vocab_size
        moved = (model(changed)[0] != before).any(-1)[0].tolist()
        print("  " + " ".join("x" if m else "." for m in moved))
        assert moved == [t >= k for t in range(len(moved))], f"token {k}"


def check_training() -> None:
    assert [t.tolist() for t in shifted(torch.tensor([[5, 6, 7]]))] == [[[5, 6]], [[6, 7]]]
    corpus = MarkovCorpus()
    losses = train(GPTConfig(vocab_size=corpus.alphabet), corpus, steps=100)
    above = losses[-1] - corpus.floor
    print(f"first loss {losses[0]:.4f}, val loss {losses[-1]:.4f}, {above:.4f} above the floor")
    assert abs(losses[0] - math.log(corpus.alphabet)) < 0.1, f"first loss is {losses[0]:.4f}"
    # The floor is the chain's own loss on these very tokens; a model may be lucky on a few.
    assert -0.01 < above < 0.05, f"val loss is {above:.4f} above the floor"


def main() -> None:
    config = GPTConfig(vocab_size=11, context_length=8, n_heads=4, d_model=24, d_head=5, d_ff=40)
    input_ids = torch.tensor([list(map(int, row)) for row in ("3141592", "2718281")])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]])
    check_causality(check_model(config, input_ids, mask), input_ids)
    check_training()


if __name__ == "__main__":
    main()
