"""An all-reduce sums on every rank; a rank that skips it makes the other say so after 5 s.

python test_two_ranks.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(*flags: str) -> tuple[int, str, float]:
    """(exit status, all output, seconds)"""
    started = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, "two_ranks.py", *flags],
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout, time.monotonic() - started


def main() -> None:
    status, output, pace = start()
    assert status == 0, output
    for rank in range(2):
        assert f"rank {rank} of 2: the sum is 3.0" in output, output
    print("both ranks: 1.0 + 2.0 = 3.0")

    status, output, seconds = start("--skip-on-rank", "1")
    assert status != 0, output
    assert "error: rank 0 waited 5 s in an all-reduce: another rank never came to it" in output
    assert "the sum is" not in output, output
    told = f"it took {seconds:.1f} s, and {pace:.1f} s where no rank skips"
    assert 5 <= seconds < 5 + 10 * pace, told
    print("rank 1 skips: rank 0 says so after 5 s, and torchrun ends both")


if __name__ == "__main__":
    main()
