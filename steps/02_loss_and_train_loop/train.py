"""Trains on a corpus whose true loss is known, and says how far above it the model ends.

python train.py
"""

from __future__ import annotations

import math

import torch
from config import GPTConfig
from environment import Flags, count, run
from model import GPTModel, init_weights
from tqdm import tqdm

from data import MarkovCorpus


def train(config: GPTConfig, corpus: MarkovCorpus, steps: int, rows: int = 16) -> list[float]:
    """The loss of each step, then the validation loss, in nats."""
    model = GPTModel(config)
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    bar = tqdm(range(steps), unit="step", leave=False)
    for step in bar:
        input_ids, labels = corpus.batch(step, rows, config.context_length)
        _, loss = model(input_ids, labels=labels, return_logits=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    with torch.no_grad():
        input_ids, labels = corpus.validation(config.context_length)
        _, loss = model(input_ids, labels=labels, return_logits=False)
    return [*losses, loss.item()]


def main() -> None:
    parser = Flags()
    parser.add_argument("--steps", type=count, default=200)
    steps = parser.parse_args().steps
    print("one process: no rank but this one")
    corpus = MarkovCorpus()
    losses = train(GPTConfig(vocab_size=corpus.alphabet), corpus, steps)
    print(f"ln V {math.log(corpus.alphabet):.4f}, floor {corpus.floor:.4f}")
    for step in sorted({0, steps // 4, steps // 2, steps - 1}):
        print(f"step {step + 1:4d}/{steps}  loss {losses[step]:.6f}")
    print(f"val loss {losses[-1]:.6f}, {losses[-1] - corpus.floor:.4f} nats above the floor")


if __name__ == "__main__":
    run(main)
