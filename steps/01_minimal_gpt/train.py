"""Learns one line by heart, to see that gradients flow; a real loop comes with the next step.

python train.py
"""

import torch
from config import GPTConfig
from model import GPTModel, init_weights

LINE = b"the rank that skips a collective hangs the others"
STEPS = 60


def main() -> None:
    print("one process: no rank but this one")
    config = GPTConfig(vocab_size=128, context_length=len(LINE))
    model = GPTModel(config)
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor([list(LINE)])
    for step in range(1, STEPS + 1):
        _, loss = model(tokens[:, :-1], labels=tokens[:, 1:], return_logits=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3d}/{STEPS}  loss {loss.item():.6f}")
    logits, _ = model(tokens[:, :-1])
    print(bytes([LINE[0], *logits[0].argmax(-1).tolist()]).decode())


if __name__ == "__main__":
    main()
