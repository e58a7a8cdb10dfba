#!/usr/bin/env bash
# torch.optim with fused=True: the update is in place, and no tensor's version counter moves.
#
# Versions: torch 2.13.0.
# Why it matters: autograd finds a weight that changed between forward and backward by that counter.
# With foreach=True, or neither, a step that comes too early (while a pipeline has micro-batches
# under way, or with two optimizers) ends in an error. With fused=True backward goes on with the new
# weights and the old activations, so its gradient is that of no model. Caches that ask `_version`
# whether a weight is as it was, bf16 copies for example, keep what is stale. Drop such a cache by
# hand at each step, and try a new order of steps once with fused=False.
# Documented: no. The same for Adam, AdamW, SGD and Adagrad, the optimizers that have fused=True.
#
# Exits 0 while it is so, 1 once it has changed, 2 if the packages do not install.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 || exit 2

cat >"$work/look.py" <<'PY'
import sys

import torch
from torch import nn

OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def seen(optimizer: type, **how: bool) -> tuple[int, str]:
    """How far the version counter moves in a step, and what backward makes of the early step."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)
    loss = second(first(torch.randn(8, 4))).sum()
    (right,) = torch.autograd.grad(loss, first.weight, retain_graph=True)
    second.weight.grad = torch.ones_like(second.weight)
    stepping = optimizer(second.parameters(), lr=0.1, **how)
    before = second.weight._version
    stepping.step()
    moved = second.weight._version - before
    try:
        (gradient,) = torch.autograd.grad(loss, first.weight)
    except RuntimeError:
        return moved, "error"
    return moved, f"a gradient, off by {(gradient - right).abs().max() / right.abs().max():.0%}"


print(f"torch {torch.__version__}, CPU: forward, a step of the optimizer, backward of that forward")
print("guess: the counter of a changed weight moves, and backward raises, however one asks")
same = True
for optimizer in OPTIMIZERS:
    found = {name: seen(optimizer, **{name: True}) for name in ("foreach", "fused")}
    same &= found["foreach"][0] > 0 and found["foreach"][1] == "error"
    same &= found["fused"][0] == 0 and found["fused"][1].startswith("a gradient")
    shown = "; ".join(f"{name}: moved by {n}, {what}" for name, (n, what) in found.items())
    print(f"seen:  {optimizer.__name__}: {shown}")
sys.exit(not same)
PY

if "$work/venv/bin/python" -W ignore "$work/look.py"; then
    echo "it is still so"
else
    echo "it has changed" && exit 1
fi
