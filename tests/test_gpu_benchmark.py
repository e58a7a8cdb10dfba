"""`make bench-gpu` works where there is no GPU, and a part that takes too long is cut short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import gpu, side_by_side


@pytest.fixture(autouse=True)
def _without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)


@pytest.mark.skipif(
    not os.environ.get("BENCH"), reason="make bench: a minute of compiling and timing"
)
def test_tiny_shapes_go_through_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main({"large": 250, "pair": 180}) == 0
    printed = capsys.readouterr().out
    assert "not a GPU's figures" in printed
    for row in ("larger tiny GPT, batch 4, ours ", "smaller tiny GPT, plain recipe "):
        assert f"  {row}" in printed
    (path,) = tmp_path.glob("gpu-tiny-on-cpu-*.json")
    kept = json.loads(path.read_text())
    assert kept["ratio"] > 0
    assert [len(rounds) for rounds in kept["figures"]["pair"].values()] == [5, 5]
    assert len(kept["figures"]["large"]["ours"]) == 5
    assert kept["ended_early"] == {"large": "", "pair": ""}


def test_a_part_that_takes_too_long_is_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    told, problem = gpu.run_part("pair", 0.2)
    assert (told, problem) == ([], "its 0.2 s were over")
    assert not gpu.report("pair", told, problem, {"ours": "ours", "plain": "plain"})
    assert capsys.readouterr().out == "  pair: no figures, its 0.2 s were over\n"


def test_what_was_told_before_the_end_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's table, its first part ended by an error after two rounds, its second never begun."""
    one = {"side": "ours", "seconds": 0.5, "tokens_per_second": 2e4, "flops": 2e14}
    facts = [{"card": "a card", "flops_of_product": 4e14}, {"micro_batch": 8}]
    ended = {"large": ([*facts, one, one], "it ended with status 1"), "pair": ([], "why")}
    monkeypatch.setattr(gpu, "run_part", lambda part, _: ended[part])
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    assert "a card\n" in printed
    assert "large: cut short after 2 rounds, it ended with status 1" in printed
    assert "pair: no figures, why" in printed
    kept = {path.name[:8]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert kept["gpu-1.5b"]["ratio"] == 0.5
    assert kept["gpu-124m"]["figures"] == {}
