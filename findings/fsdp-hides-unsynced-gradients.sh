#!/usr/bin/env bash
# fully_shard: gradients that are not yet reduced are hidden from zero_grad and clip_grad_norm_.
#
# Versions: torch 2.13.0.
# Why it matters: between set_requires_gradient_sync(False) and the last micro-batch the sum lies
# outside .grad, which is None. Whoever drops a batch half-way (a NaN, a time limit, an evaluation)
# and calls zero_grad() carries the dropped gradient into the next step. clip_grad_norm_ gives 0.
# DDP's no_sync keeps the sum in .grad, where zero_grad clears it.
# Documented: no; set_requires_gradient_sync is documented as "accumulation without communication".
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
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def look(rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    model = torch.nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    x = torch.ones(1, 4)  # the gradient of each weight is 1

    model.set_requires_gradient_sync(False)
    (1000 * model(x).sum()).backward()  # a batch that is then dropped
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    model.zero_grad()
    model.set_requires_gradient_sync(True)
    model(x).sum().backward()
    gradient = model.weight.grad.full_tensor()[0, 0].item()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(f"torch {torch.__version__}, fully_shard, 2 ranks, a batch of gradient 1000 dropped")
        print("guess: its norm is 4000; after zero_grad the next batch's gradient is 1")
        print(f"seen:  its norm is {norm:g}; after zero_grad the next batch's gradient is {gradient:g}")
        sys.exit(norm != 0 or gradient != 1001)


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
