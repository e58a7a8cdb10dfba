"""`make bench-gpu` works where there is no GPU, and a part that takes too long is cut short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_parts, side_by_side


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
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert "not a GPU's figures" in printed
    rows = ("larger tiny GPT, batch 4, ours ", "smaller tiny GPT, plain recipe ")
    for row in (*rows, "tiny Llama, batch 4, ours ", "tiny Llama, batch 4, Hugging Face's "):
        assert f"  {row}" in printed
    (path,) = tmp_path.glob("gpu-tiny-on-cpu-*.json")
    kept = json.loads(path.read_text())
    assert kept["ratios"].keys() == {"large", "pair", "llama"}
    assert min(kept["ratios"].values()) > 0
    for part, sides in {"large": 1, "pair": 2, "llama": 2}.items():
        assert [len(rounds) for rounds in kept["figures"][part].values()] == [5] * sides
    assert set(kept["ended_early"].values()) == {""}


def test_all_of_it_ends_within_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) < 8 * 60


def test_a_part_that_takes_too_long_is_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    told, problem = gpu.run_part("pair", 0.2)
    assert (told, problem) == ([], "its 0.2 s were over")
    assert not gpu.report("pair", told, problem, {"ours": "ours", "theirs": "plain"})
    assert capsys.readouterr().out == "  pair: no figures, its 0.2 s were over\n"


def test_what_was_told_before_the_end_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's table, its first part ended by an error after two rounds, its second never begun."""
    ours = {"side": "ours", "seconds": 0.2, "tokens_per_second": 3e4, "flops": 3e14}
    one = {"side": "ours", "seconds": 0.5, "tokens_per_second": 2e4, "flops": 2e14}
    facts = [{"card": "a card", "flops_of_product": 4e14}, {"micro_batch": 8}]
    ended = {"large": ([*facts, one, one], "it ended with status 1"), "pair": ([], "why")}
    ended["llama"] = ([*facts, *[ours, {**one, "side": "theirs"}] * 5], "")
    monkeypatch.setattr(gpu, "run_part", lambda part, _: ended[part])
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    assert "a card\n" in printed
    assert "large: cut short after 2 rounds, it ended with status 1" in printed
    assert "pair: no figures, why" in printed
    kept = {path.name[:8]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert kept["gpu-1.5b"]["ratio"] == 0.5
    assert kept["gpu-124m"]["figures"] == {}
    assert "Llama 1B, batch 8, Hugging Face's" in printed
    assert kept["gpu-llam"]["ratio"] == 1.5


def test_the_first_number_of_sequences_that_fits_beside_all_moments_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A memory of twelve: a sequence takes one in a step, a model's moments take four from then."""
    moments: list[torch.optim.Optimizer] = []

    def side() -> gpu_parts.Trained:
        optimizer = torch.optim.Adam([torch.ones(1, requires_grad=True)])

        def step(rows: int) -> None:
            held = sum(bool(other.state) for other in moments)
            if 4 * held + rows > 12:
                raise torch.OutOfMemoryError
            optimizer.state[optimizer.param_groups[0]["params"][0]] = {"step": 1}

        moments.append(optimizer)
        return gpu_parts.Trained(step, optimizer)

    sides = [side(), side()]
    assert gpu_parts.rows_that_fit(sides, (16, 8, 4, 2)) == 4
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"too_large": 16}, {"too_large": 8}, {"micro_batch": 4}]
    with pytest.raises(SystemExit, match=r"no micro-batch of \(16, 8\) fits"):
        gpu_parts.rows_that_fit(sides, (16, 8))
    assert not any(optimizer.state for optimizer in moments)
