#!/usr/bin/env bash
# torch.distributed.pipelining: the first step runs the model once more, on uninitialised memory.
#
# Versions: torch 2.13.0.
# Why it matters: that run infers shapes, in training mode and on the real module. What the forward
# pass keeps is spoiled by it: running means, load counters of experts, amax histories, the state of
# the random generator. On every stage but the first the input is whatever the memory held;
# here torch.use_deterministic_algorithms(True) fills such memory with NaN, as it documents, and
# the running mean is NaN for good. Passing input_args and output_args to PipelineStage avoids it.
# Documented: that metadata is inferred from the first micro-batch is; that the state changes is not.
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
    torch.use_deterministic_algorithms(True)
    model = torch.nn.BatchNorm1d(4)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=torch.nn.functional.mse_loss)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    schedule.step(x) if rank == 0 else schedule.step(target=torch.ones(8, 4))
    gradient = bool(model.weight.grad.isfinite().all())
    dist.barrier()
    dist.destroy_process_group()
    if rank == 1:
        batches, mean = model.num_batches_tracked.item(), model.running_mean.tolist()
        print(f"torch {torch.__version__}, pipelining, 2 stages, 4 micro-batches, BatchNorm in stage 1")
        print("guess: 4 batches seen, a running mean near 0")
        print(f"seen:  {batches} batches seen, running mean {mean}, gradients finite: {gradient}")
        sys.exit(batches != 5 or not all(m != m for m in mean))


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
