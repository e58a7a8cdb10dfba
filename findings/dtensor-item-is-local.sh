#!/usr/bin/env bash
# DTensor: .item(), float() and bool() of a mean, a norm or any() give each rank its own number.
#
# Versions: torch 2.13.0.
# Why it matters: reductions stay Partial, and a Partial tensor turned into a Python number is the
# local part. A logged loss is wrong, and `if (grads > limit).any():` takes different branches on
# different ranks, where the next collective waits for ever. x.sum() + 1 is right, and so is
# printing full_tensor(); nothing tells the two kinds apart. Write x.mean().full_tensor().item().
# Documented: no. The maintainers call it intended in pytorch issue 144054; 166638 is open.
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
from torch.distributed.tensor import Shard, distribute_tensor


def look(rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    mine = torch.tensor([x.mean().item(), x.max().item(), float(bool((x > 6).any()))])
    ranks = [torch.empty(3) for _ in range(2)]
    dist.all_gather(ranks, mine)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        seen = [(mean, biggest, bool(above)) for mean, biggest, above in (r.tolist() for r in ranks)]
        print(f"torch {torch.__version__}, DTensor of 0 ... 7, cut over 2 ranks")
        print("guess: mean 3.5, max 7.0, (x > 6).any() True, on both ranks")
        for r, (mean, biggest, above) in enumerate(seen):
            print(f"seen:  mean {mean}, max {biggest}, (x > 6).any() {above}, on rank {r}")
        sys.exit(seen != [(1.5, 3.0, False), (5.5, 7.0, True)])


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
