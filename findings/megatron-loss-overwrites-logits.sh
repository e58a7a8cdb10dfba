#!/usr/bin/env bash
# megatron-core: vocab_parallel_cross_entropy leaves probabilities where the logits were.
#
# Versions: megatron-core 0.16.1, torch 2.13.0.
# Why it matters: with float32 logits the loss works in the caller's tensor. A z-loss, an entropy, a
# distillation loss or a logged logit computed after it is silently computed from the softmax. With
# bf16 logits a copy is made and all is well, so it depends on the dtype. Whoever trains by
# reinforcement meets it: verl had the wrong entropy until it swapped the two calls (its pull 1672).
# Documented: no. Megatron-LM pull request 1594 (open) changes it.
#
# Exits 0 while it is so, 1 once it has changed, 2 if the packages do not install.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6 megatron-core==0.16.1 || exit 2

cat >"$work/look.py" <<'PY'
import sys

import megatron.core
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state, tensor_parallel


def look(rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 8)
    target = torch.zeros(3, 2, dtype=torch.long)
    changed = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits = whole.chunk(2, dim=-1)[rank].to(dtype).clone()
        kept = logits.clone()
        tensor_parallel.vocab_parallel_cross_entropy(logits, target)
        changed[dtype] = not torch.equal(logits, kept)
        if dtype == torch.float32:
            shares = whole.softmax(dim=-1).chunk(2, dim=-1)[rank]
            are_shares = torch.allclose(logits, shares)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(f"megatron-core {megatron.core.__version__}, torch {torch.__version__}, 2 ranks")
        print("guess: the loss leaves the logits as they are, in each dtype")
        print(
            f"seen:  changed in float32: {changed[torch.float32]}, into the softmax: {are_shares};"
            f" changed in bfloat16: {changed[torch.bfloat16]}"
        )
        sys.exit(not are_shares or changed[torch.bfloat16])


if __name__ == "__main__":
    try:
        mp.spawn(look, nprocs=2)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)
PY

export OMP_NUM_THREADS=1
if "$work/venv/bin/python" -W ignore "$work/look.py" "$work/store"; then
    echo "it is still so"
else
    echo "it has changed" && exit 1
fi
