#!/usr/bin/env bash
# get_optimizer_state_dict of an AdamW that has not stepped yet changes how it trains.
#
# Versions: torch 2.13.0.
# Why it matters: torch.distributed.checkpoint.state_dict fills an empty optimizer by a step with
# zero gradients and a learning rate of 0, and that step is counted. A run that saves a checkpoint at
# step 0 makes a first update of 0.74 times the learning rate instead of 1, and all later ones
# differ from those of a run that did not save: reading the state is not read-only.
# Documented: no. pytorch issue 164929 (open); torchtitan and Megatron each fixed their own copy.
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
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(saves: bool) -> tuple[float, int]:
    """The largest change of a weight in the first step, and the steps that AdamW has counted."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    if saves:
        get_optimizer_state_dict(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    steps = int(optimizer.state[model.weight]["step"])
    return (model.weight.detach() - before).abs().max().item(), steps


plain, saved = first_update(False), first_update(True)
print(f"torch {torch.__version__}, AdamW, lr 0.1, weight decay 0, the first step")
print(f"guess: a change of {plain[0]:.4f} at step {plain[1]}, with or without saving before it")
print(f"seen:  a change of {saved[0]:.4f} at step {saved[1]} if the state was saved before it")
sys.exit(plain[1] != 1 or saved[1] != 2 or abs(saved[0] - 0.0744) > 1e-3)
PY

export OMP_NUM_THREADS=1
if "$work/venv/bin/python" -W ignore "$work/look.py" "$work/store"; then
    echo "it is still so"
else
    echo "it has changed" && exit 1
fi
