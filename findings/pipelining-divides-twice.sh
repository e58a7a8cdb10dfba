#!/usr/bin/env bash
# torch.distributed.pipelining: a second step() divides what the first one left in .grad again.
#
# Versions: torch 2.13.0.
# Why it matters: gradient accumulation over two calls of schedule.step(), the way it is done
# everywhere else, weights the batches unequally. With 4 micro-batches the first batch counts a
# quarter of the second, with a third call a sixteenth. No error, and the loss still falls.
# scale_grads=False and a loss divided by hand are right.
# Documented: no; scale_grads is said to scale by the number of micro-batches. torchtitan found its
# own accumulation broken by it (its issue 1733).
#
# Exits 0 while it is so, 1 once it has changed, 2 if the packages do not install.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6 || exit 2

cat >"$work/look.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


def look(rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    layer = torch.nn.Linear(4, 4, bias=False)
    stage = PipelineStage(layer, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(
        stage, n_microbatches=4, loss_fn=torch.nn.functional.mse_loss, scale_grads=True
    )
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))

    def step() -> torch.Tensor:
        schedule.step(x) if rank == 0 else schedule.step(target=torch.ones(8, 4))
        return layer.weight.grad.clone()

    once = step()
    twice = step()  # the same batch again, without zero_grad between
    ratio = (twice.norm() / once.norm()).item()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(f"torch {torch.__version__}, pipelining, 2 stages, 4 micro-batches, one batch twice")
        print("guess: the gradient is 2 times that of one call")
        print(f"seen:  the gradient is {ratio:.4f} times that of one call")
        sys.exit(abs(ratio - 1.25) > 1e-4)


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
