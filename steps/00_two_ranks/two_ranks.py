"""Two ranks, one all-reduce, and what a rank that leaves it out does to the others.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 two_ranks.py
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 two_ranks.py --skip-on-rank 1
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 5.0  # seconds that a rank waits for the others
RUN = " OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 two_ranks.py"


class Hang(RuntimeError):
    """The others did not come to the collective in time."""


def sum_over_ranks(value: float) -> float:
    """The sum of all ranks' values, on every rank. Raises Hang if a rank does not take part."""
    tensor = torch.tensor([value])
    try:
        work = dist.all_reduce(tensor, async_op=True)  # in place: every rank ends with the same sum
        work.wait(timedelta(seconds=TIMEOUT))
    except RuntimeError as error:
        raise Hang(
            f"rank {dist.get_rank()} waited {TIMEOUT:.0f} s in an all-reduce: another rank never "
            "came to it"
        ) from error
    return tensor.item()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-on-rank", type=int, help="this rank leaves the all-reduce out")
    skips = parser.parse_args().skip_on_rank
    if "RANK" not in os.environ:
        print("error: one process has nobody to talk to; start two:" + RUN, file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank} of {world_size}: process {os.getpid()}, holds {rank + 1.0}", flush=True)
    if rank == skips:
        time.sleep(TIMEOUT + 2)  # busy with something else, and alive: that is what hangs others
        return 0
    try:
        total = sum_over_ranks(rank + 1.0)
    except Hang as hang:
        print(f"error: {hang}", file=sys.stderr, flush=True)
        os._exit(1)  # a clean end would wait for the rank that never came
    print(f"rank {rank} of {world_size}: the sum is {total}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
