#!/usr/bin/env bash
# gloo: all_reduce, reduce and broadcast of a strided view work on the wrong elements.
#
# Versions: torch 2.13.0.
# Why it matters: `dist.all_reduce(grad[:, :k])`, or a transposed weight, gives wrong numbers and
# overwrites elements outside the view. nccl refuses such a tensor ("Tensors must be contiguous"),
# so does gloo's all_to_all_single; code tested only on a CPU passes, and is wrong.
# Documented: no. pytorch issue 192920 (open) names scatter, broadcast and reduce.
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


def look(rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    whole = torch.arange(12.0).reshape(3, 4)  # the same on both ranks, so a sum is twice each element
    right = 2 * whole[:, :2]
    dist.all_reduce(whole[:, :2])
    seen, outside = whole[:, :2], whole[:, 2:]
    untouched = torch.equal(outside, torch.arange(12.0).reshape(3, 4)[:, 2:])
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(f"torch {torch.__version__}, gloo, 2 ranks, all_reduce(x[:, :2]) of a 3 x 4 tensor")
        print(f"guess: {right.tolist()}, or an error; x[:, 2:] stays as it was")
        print(f"seen:  {seen.tolist()}; x[:, 2:] stayed: {untouched}")
        sys.exit(torch.equal(seen, right) or untouched)


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
