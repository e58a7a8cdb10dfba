"""The many-rank harness itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch.distributed as dist
from ranks import NoMeeting, RankFailure, run_ranks


def fails_to_meet(attempts: str) -> None:
    """As a launch whose first two attempts gloo cannot connect."""
    with Path(attempts).open("a") as file:
        file.write(".")
    if Path(attempts).stat().st_size < 3:
        raise NoMeeting("connectFullMesh failed")


def test_ranks_that_could_not_meet_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, tries = ranks._run_once, []

    def attempt(n_ranks: int, *arguments: object) -> list[object]:
        tries.append(n_ranks)
        return once(1, fails_to_meet, str(tmp_path / "attempts"))

    monkeypatch.setattr(ranks, "_run_once", attempt)
    assert run_ranks(2, os.getpid) == [None]
    assert tries == [2, 2, 2]
    monkeypatch.setattr(ranks, "TRIES", 1)
    (tmp_path / "attempts").unlink()
    with pytest.raises(NoMeeting, match="connectFullMesh failed"):
        run_ranks(2, os.getpid)


def breaks_in_a_group() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("connection closed by peer")
    dist.barrier()


def test_what_fails_later_is_not_tried_again() -> None:
    with pytest.raises(RankFailure, match="connection closed by peer") as caught:
        run_ranks(2, breaks_in_a_group)
    assert caught.type is RankFailure
