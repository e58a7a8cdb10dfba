#!/usr/bin/env bash
# CPU autocast: layer_norm's float32 weight gets a gradient that was summed in bf16, and stalls.
#
# Versions: torch 2.13.0.
# Why it matters: with bf16 activations the gradients of a LayerNorm's weight and bias are added up
# token by token in bf16, which cannot count past 256. 10,000 ones give 256. The weights are float32,
# so is .grad, and torch.nn.Linear beside it is right: its bias gradient is within rounding. A data-
# parallel split then changes the gradient by far more than rounding, for each rank adds fewer.
# On CUDA autocast runs layer_norm in float32; on a CPU it does not.
# Documented: the two lists of autocast operations show the difference, not what follows from it.
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

TOKENS = 10_000


def bias_gradient(layer: torch.nn.Module, tokens: int) -> float:
    """The gradient of the layer's bias if each of its outputs has the gradient 1."""
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.ones(tokens, 8, dtype=torch.bfloat16))
    y.backward(torch.ones_like(y))
    assert layer.bias.grad.dtype == torch.float32
    return layer.bias.grad[0].item()


torch.set_num_threads(1)
linear = bias_gradient(torch.nn.Linear(8, 8), TOKENS)
norm = bias_gradient(torch.nn.LayerNorm(8), TOKENS)
half = bias_gradient(torch.nn.LayerNorm(8), TOKENS // 2)
print(f"torch {torch.__version__}, CPU, autocast to bfloat16, {TOKENS} tokens, bias gradients")
print(f"guess: Linear {TOKENS}, LayerNorm {TOKENS}, LayerNorm on half of them {TOKENS // 2}")
print(f"seen:  Linear {linear:.0f}, LayerNorm {norm:.0f}, LayerNorm on half of them {half:.0f}")
sys.exit(abs(linear - TOKENS) > 100 or not norm == half == 256)
PY

export OMP_NUM_THREADS=1
if "$work/venv/bin/python" -W ignore "$work/look.py" "$work/store"; then
    echo "it is still so"
else
    echo "it has changed" && exit 1
fi
