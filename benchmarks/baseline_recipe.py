"""What a user would pick instead: a plain GPT-2 in one file, and nanoGPT's recipe for a laptop.

python benchmarks/baseline_recipe.py CORPUS [UPDATES [SEED]]

Nothing of rosetrainer is imported: PyTorch's own modules, attention kernel and default AdamW, one
process, the threads that torch has. The recipe: 4 layers, 4 heads, d_model 128, context 64, batch
12, 2000 updates of fp32 on the characters of a text, as `prepare` cut it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_LAYERS, N_HEADS, D_MODEL, CONTEXT, BATCH, UPDATES = 4, 4, 128, 64, 12, 2000
PEAK, FLOOR, WARMUP = 1e-3, 1e-4, 100


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int, bias: bool, gelu: str) -> None:
        super().__init__()
        self.n_heads, self.gelu = n_heads, gelu
        self.norm_1 = nn.LayerNorm(d_model, bias=bias)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.norm_2 = nn.LayerNorm(d_model, bias=bias)
        self.up = nn.Linear(d_model, 4 * d_model, bias=bias)
        self.down = nn.Linear(4 * d_model, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, K)
            for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate=self.gelu))


class PlainGPT(nn.Module):
    """(B, T) ids and labels -> the mean loss, all logits at once; embeddings tied."""

    def __init__(
        self,
        vocab: int,
        context: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        bias: bool,
        gelu: str = "none",
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, d_model)
        self.positions = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(
            PlainBlock(d_model, n_heads, bias, gelu) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model, bias=bias)
        self.head = nn.Linear(d_model, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain_optimizer(model: nn.Module, rate: float, beta2: float = 0.95) -> torch.optim.AdamW:
    """torch's AdamW as it comes; matrices decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, beta2))


def rate_at(update: int) -> float:
    if update < WARMUP:
        return PEAK * (update + 1) / (WARMUP + 1)
    progress = (update - WARMUP) / (UPDATES - WARMUP)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def read_corpus(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Token ids of train.bin and val.bin, and how many different ones there are."""
    train, val = (
        torch.from_numpy(np.fromfile(folder / name, "<u2").astype(np.int64))
        for name in ("train.bin", "val.bin")
    )
    return train, val, json.loads((folder / "meta.json").read_text())["vocab_size"]


def train(model: PlainGPT, ids: Tensor, updates: int, seed: int) -> float:
    """Seconds that the updates took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = plain_optimizer(model, PEAK, beta2=0.99)
    started = time.perf_counter()
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update)
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator).tolist()
        inputs = torch.stack([ids[i : i + CONTEXT] for i in starts])
        labels = torch.stack([ids[i + 1 : i + 1 + CONTEXT] for i in starts])
        loss = model(inputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


@torch.no_grad()
def validate(model: PlainGPT, ids: Tensor) -> float:
    """The mean loss in nats over all of the text's whole windows, each token once."""
    windows = (len(ids) - 1) // CONTEXT
    used = ids[: windows * CONTEXT + 1]
    inputs, labels = used[:-1].view(windows, CONTEXT), used[1:].view(windows, CONTEXT)
    losses = [
        model(a, b) * len(a) for a, b in zip(inputs.split(128), labels.split(128), strict=True)
    ]
    return float(sum(losses)) / windows


def main(corpus: str, updates: int = UPDATES, seed: int = 1) -> None:
    torch.manual_seed(seed)
    train_ids, val_ids, vocab = read_corpus(Path(corpus))
    model = PlainGPT(vocab, CONTEXT, N_LAYERS, N_HEADS, D_MODEL, bias=False)
    seconds = train(model, train_ids, updates, seed)
    print(json.dumps({"seconds": seconds, "updates": updates, "loss": validate(model, val_ids)}))


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:]))
