#!/usr/bin/env bash
# gloo: MAX forgets a NaN that is not on the right rank, so clip_grad_norm_ does not see it.
#
# Versions: torch 2.13.0.
# Why it matters: with fully_shard and norm_type=inf the ranks' norms meet in an all-reduce with
# MAX. A NaN in rank 1's gradient is lost, error_if_nonfinite=True raises nothing, and the step
# puts NaN into the weights. The same holds for any max over ranks: a loss, an amax for fp8.
# torch.max itself keeps NaN. Add a SUM, or a flag of your own, if NaN has to be seen.
# Documented: no; error_if_nonfinite promises an error for "nan, inf, or -inf".
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


def clip(rank: int, nan_on: int) -> str:
    """What clip_grad_norm_ says when one element of the gradient is NaN, on rank `nan_on`."""
    model = torch.nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.ones(1, 4)).sum().backward()
    if rank == nan_on:
        model.weight.grad.to_local()[0, 0] = float("nan")
    try:
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), 1.0, norm_type=float("inf"), error_if_nonfinite=True
        )
    except RuntimeError:
        return "error"
    return f"norm {norm.full_tensor().item()}"


def look(rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    seen = [clip(rank, nan_on) for nan_on in (0, 1)]
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(f"torch {torch.__version__}, gloo, 2 ranks, a NaN in one gradient, max norm, clipped")
        print("guess: NaN on rank 0: error; NaN on rank 1: error")
        print(f"seen:  NaN on rank 0: {seen[0]}; NaN on rank 1: {seen[1]}")
        sys.exit(seen != ["error", "norm 1.0"])


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
