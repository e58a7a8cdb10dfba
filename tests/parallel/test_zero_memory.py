"""What a rank holds at each of ZeRO's levels: under a limit, and beside the closed form."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import pytest
from faults.harness import Fault, kill, run

from rosetrainer.commands.plan import main as plan

SHAPE = ["--n-layers", "12", "--n-heads", "4", "--d-model", "512", "--context-length", "16"]
WORK = ["--steps", "1", "--eval-every", "0", "--global-batch-size", "4", "--dtype", "float32"]
OF_THREADS = 2**25
"""Their stacks, and what malloc keeps ahead."""
DATA_PARALLEL = [*SHAPE, *WORK, "--dp-size", "4"]


def planned(capsys: pytest.CaptureFixture[str], markov: Path, level: int) -> int:
    """Bytes of a rank, as a user is told."""
    plan(["--nproc", "4", *DATA_PARALLEL, "--zero", str(level), "--data", str(markov)])
    found = re.search(r"at once, in the backward pass +([\d,]+)", capsys.readouterr().out)
    assert found
    return int(found[1].replace(",", ""))


class Limit:
    """Of a rank, when it begins: so many bytes more than it has with all that it imports."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __call__(self, _: int) -> None:
        status = Path("/proc/self/status").read_text()
        has = int(status.partition("VmData:")[2].split()[0]) * 1024  # it says kB
        resource.setrlimit(resource.RLIMIT_DATA, (has + self.more,) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel keeps no such limit")
def test_a_model_fits_by_zero_that_does_not_without(
    markov: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit, which the kernel keeps, lies between what `plan` says of levels 0 and 3."""
    without, with_zero = (planned(capsys, markov, level) for level in (0, 3))
    limit = Limit((without + with_zero) // 2 + OF_THREADS)
    outcomes = []
    for level in (0, 3):
        out = tmp_path / f"level {level}"
        command = [*DATA_PARALLEL, "--zero", str(level), "--data", str(markov), "--out", str(out)]
        ends = [Fault(rank, 1, "updated", kill) for rank in range(4)]  # 450 MB need not be saved
        outcomes.append(run(4, [*command, "--threads", "1"], *ends, prepare=limit))
    too_large, fits = outcomes
    assert fits.statuses == [-9] * 4, fits.said + fits.complained
    assert set(too_large.statuses) == {1}, too_large
    assert too_large.complained.count("error:") == 1
    told = r"error: rank [0-3] of 4 ran out of memory when it asked for \d+ bytes more\n  training"
    assert re.match(told, too_large.complained)
    assert "--zero 3" in too_large.complained
    assert "Traceback" not in too_large.complained
