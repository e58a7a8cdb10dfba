#!/usr/bin/env bash
# transformers: the experts' balance loss calls a model balanced whose every layer has collapsed.
#
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters: load_balancing_loss_func joins the router logits of all layers and then takes the
# means, so a layer that sends each token to expert 0 is excused by one that sends each to expert 1.
# Four layers on four different experts score 1, the best value; computed a layer and averaged, as
# in the Switch Transformer paper, they score 4, the worst. Under expert parallelism each layer then
# waits for one rank, and the loss does not push against it.
# Documented: no; the function cites equations (4) to (6) of that paper. Issues 28255 and 31464 of
# transformers, both closed, describe it.
#
# Exits 0 while it is so, 1 once it has changed, 2 if the packages do not install.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0 || exit 2

cat >"$work/look.py" <<'PY'
import sys

import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

EXPERTS, TOKENS = 4, 100

# Layer i sends all of its tokens to expert i.
layers = tuple(
    20 * torch.nn.functional.one_hot(torch.full((TOKENS,), i), EXPERTS).float()
    for i in range(EXPERTS)
)
alone = [float(load_balancing_loss_func((layer,), EXPERTS, top_k=1)) for layer in layers]
mean = sum(alone) / EXPERTS
together = float(load_balancing_loss_func(layers, EXPERTS, top_k=1))
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"{EXPERTS} layers, {EXPERTS} experts, layer i sends each token to expert i; 1 is best, 4 worst")
print(f"guess: {mean:.2f}, the mean of the layers' losses")
print(f"seen:  {together:.2f}")
sys.exit(abs(mean - 4) > 0.01 or abs(together - 1) > 0.01)
PY

export OMP_NUM_THREADS=1
if "$work/venv/bin/python" -W ignore "$work/look.py" "$work/store"; then
    echo "it is still so"
else
    echo "it has changed" && exit 1
fi
