"""Checkpoints: bitwise in the layout that wrote them, exact in every other, and never half."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_all_equal
from ranks import run_ranks
from runs import STEPS, state, train_here
from safetensors import safe_open
from safetensors.torch import load_file

from rosetrainer.checkpoint import manifest
from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    Progress,
    checkpoints,
    is_sound,
    read_manifest,
)
from rosetrainer.checkpoint.slices import Draft, Written, retain
from rosetrainer.commands import checkpoint as checkpoint_command
from rosetrainer.config import GPTConfig, OptimConfig, TrainConfig
from rosetrainer.training.setup import check_config, train
from rosetrainer.validation import ConfigError


@pytest.fixture
def config(markov: Path, tmp_path: Path) -> TrainConfig:
    """Six tiny steps with dropout, a checkpoint after each, two of them kept."""
    return TrainConfig(
        GPTConfig(context_length=8, n_layers=2, n_heads=4, d_model=16, dropout=0.1),
        optim=OptimConfig(warmup_steps=2, global_batch_size=4),
    ).with_settings(
        data=markov,
        out=tmp_path / "run",
        steps=STEPS,
        eval_every=0,
        eval_tokens=64,
        dtype="float64",
        checkpoint_every=1,
        threads=1,
    )


def trained(
    config: TrainConfig, world: int, dp: int, stop_after: int, **run: Any
) -> dict[int, float]:
    """The exact losses by step on rank 0; the run is asked to stop after a step."""
    config = config.with_settings(dp_size=dp, **run)
    return run_ranks(world, train_here, config, world, stop_after)[0]


LAYOUTS = {"tp2": (2, 1), "dp2": (2, 2), "tp2dp2": (4, 2), "alone": (1, 1)}


@pytest.mark.parametrize(
    "layout, dtype, zero",
    [
        *((layout, dtype, 0) for layout in LAYOUTS for dtype in ("float32", "bfloat16")),
        *(("dp2", "float32", 1), ("dp2", "bfloat16", 2), ("tp2dp2", "float32", 3)),
    ],
)
def test_a_resumed_run_is_bitwise_the_one_that_was_not_interrupted(
    config: TrainConfig, layout: str, dtype: str, zero: int, tmp_path: Path
) -> None:
    world, dp = LAYOUTS[layout]
    whole = trained(config, world, dp, 0, dtype=dtype, zero=zero)
    out = tmp_path / "resumed"
    first = trained(config, world, dp, 3, dtype=dtype, zero=zero, out=out)
    rest = trained(config, world, dp, 0, dtype=dtype, zero=zero, out=out)
    assert (list(first), list(rest)) == ([1, 2, 3], [4, 5, 6])
    assert first | rest == whole
    ours, expected = (state(run / "step_000006") for run in (out, tmp_path / "run"))
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert (out / "log.jsonl").read_text().count('"train/loss"') == STEPS


ROTARY: dict[str, Any] = {"architecture": "rotary", "tied": False}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_through_layouts_and_computes_what_one_process_does(
    config: TrainConfig, tmp_path: Path, optimizer: Any
) -> None:
    """tp 2 -> tp 4 -> dp 4 at level 3 of ZeRO -> tp 2 -> tp 2 x dp 2 at level 1 -> one process:
    losses, weights and moments."""
    muon = optimizer == "muon"
    if muon:  # with the other GPT
        config = replace(
            config,
            model=replace(config.model, **ROTARY),
            optim=replace(config.optim, optimizer=optimizer),
        )
    alone = trained(config, 1, 1, 0)
    out = tmp_path / "moved"
    found: dict[int, float] = {}
    layouts = [(2, 1, 0), (4, 1, 0), (4, 4, 3), (2, 1, 0), (4, 2, 1), (1, 1, 0)]
    for stop, (world, dp, zero) in enumerate(layouts, 1):
        found |= trained(config, world, dp, stop if stop < STEPS else 0, out=out, zero=zero)
    assert list(found) == list(alone)
    assert found == pytest.approx(alone, rel=1e-10)
    moved, expected = (state(run / "step_000006") for run in (out, tmp_path / "run"))
    parameters = {name for name in expected if "/" not in name}
    matrices = {name for name in parameters if f"{name}/momentum_buffer" in expected}
    assert len(matrices) == 8 * muon
    assert len(expected) == 3 * len(parameters) - len(matrices)
    assert_all_equal(*({n: s[n] for n in parameters} for s in (moved, expected)))
    for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        names = [name for name in parameters if f"{name}/{moment}" in expected]
        names = [name for name in names if muon or not name.endswith("query_key_value.bias")]
        ours, theirs = (
            {name: tensors[f"{name}/{moment}"] for name in names} for tensors in (moved, expected)
        )
        assert_all_equal(ours, theirs)


def test_the_slices_of_all_ranks_are_the_whole_once(config: TrainConfig, tmp_path: Path) -> None:
    trained(config, 4, 2, 1)
    folder = tmp_path / "run" / "step_000001"
    manifest = read_manifest(folder)
    written = sum(
        tensor.numel() for name in manifest.files for tensor in load_file(folder / name).values()
    )
    assert written == sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
    sizes = [file.size for file in manifest.files.values()]
    assert max(sizes) < 1.6 * min(sizes), "the ranks share the writing"
    progress = manifest.progress
    assert (progress.step, progress.updates, progress.tokens_seen) == (1, 1, 32)
    assert set(progress.data) == {"train.bin", "val.bin"}
    assert progress.config.model == replace(config.model, vocab_size=8)


def test_behind_training_the_same_is_saved(config: TrainConfig, tmp_path: Path) -> None:
    """The copy is taken before training goes on and changes what it is of."""
    trained(config, 2, 1, 0, keep=STEPS)
    out = tmp_path / "behind"
    trained(config, 2, 1, 0, keep=STEPS, out=out, async_checkpoint=True)
    for step in range(1, STEPS + 1):
        ours, expected = (state(run / f"step_{step:06d}") for run in (out, tmp_path / "run"))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_rank_that_has_left_its_word_needs_the_draft_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0, which has waited for it, may give the folder its name before the rank goes on."""
    draft, original = Draft(tmp_path, 1, "one"), Path.replace

    def replace(part: Path, target: Path) -> Path:
        done = original(part, target)
        if target.suffix == ".json":
            draft.name_whole()
        return done

    monkeypatch.setattr(Path, "replace", replace)
    draft.write_part(0, {"weight": torch.zeros(2)}, {}, 8)
    assert (tmp_path / "step_000001" / "rank_00000.safetensors").exists()


def test_keep_decides_how_many_stay(config: TrainConfig, tmp_path: Path) -> None:
    trained(config, 1, 1, 0, keep=3)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == [
        "step_000006",
        "step_000005",
        "step_000004",
    ]


def test_retention_never_removes_the_last_sound_one(config: TrainConfig, tmp_path: Path) -> None:
    trained(config, 1, 1, 0)
    run, newest = tmp_path / "run", tmp_path / "run" / "step_000006"
    file = newest / "rank_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    retain(run, keep=1)
    assert [folder.name for folder in checkpoints(run)] == ["step_000006", "step_000005"]
    file.write_bytes(content)
    retain(run, keep=1)
    assert [folder.name for folder in checkpoints(run)] == ["step_000006"]


def write_one(run: Path, step: int, config: TrainConfig) -> Written:
    """A checkpoint of one rank with one tensor."""
    slices = {"w": {"shape": [2], "dtype": "float32", "first": [0], "size": [2]}}
    draft = Draft(run, step, "one")
    draft.write_part(0, {"w": torch.full((2,), float(step))}, slices, 8)
    return draft.complete(1, Progress(step, step, 0, 0, "float32", {}, config))


def test_a_folder_that_has_gone_is_one_line(config: TrainConfig, tmp_path: Path) -> None:
    draft = Draft(tmp_path, 1, "one")
    progress = Progress(1, 1, 0, 0, "float32", {}, config)
    with pytest.raises(CheckpointError, match=f"cannot write in {tmp_path}: No such file"):
        draft.complete(0, progress)
    assert list(tmp_path.iterdir()) == []


def test_of_a_link_only_the_link_is_removed(config: TrainConfig, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    write_one(elsewhere, 1, config)
    (run / "step_000001").symlink_to(elsewhere / "step_000001")
    for step in (2, 3):
        write_one(run, step, config)
    retain(run, keep=1)
    assert [folder.name for folder in run.iterdir()] == ["step_000003"]
    assert is_sound(elsewhere / "step_000001")


def test_what_was_just_written_is_not_read_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rank 0 hashes whole checkpoints all others wait."""
    write_one(tmp_path, 1, config)
    written = write_one(tmp_path, 2, config)
    read: list[Path] = []
    original = manifest.sha256_of

    def sha256_of(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    retain(tmp_path, 1, written)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_000002"]
    assert not read
    write_one(tmp_path, 3, config)
    retain(tmp_path, 1, written)  # of the one before
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_000003"]
    assert read


def test_what_was_touched_since_it_was_written_is_read_again(
    config: TrainConfig, tmp_path: Path
) -> None:
    write_one(tmp_path, 1, config)
    written = write_one(tmp_path, 2, config)
    for name in ("rank_00000.safetensors", "manifest.json"):
        path = written.folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        retain(tmp_path, 1, written)
        assert len(checkpoints(tmp_path)) == 2, name
        path.write_bytes(content)


def refusal(config: TrainConfig, **changes: Any) -> str:
    """The one line with which a run is refused."""
    with pytest.raises(ConfigError) as caught:
        train(*check_config(config.with_settings(**changes), 1))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_gone_on_with_is_one_line(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0)
    out = tmp_path / "run"
    trained(config, 1, 1, 4)
    assert refusal(config, seed=5, learning_rate=0.1).startswith(
        f"this run has learning_rate=0.1 and not 0.001, seed=5 and not 1337 like {out}; give the"
    )
    assert f"out={out} is not empty" in refusal(config, resume="never")
    assert "nowhere holds no checkpoint; give a run folder" in refusal(config, resume="nowhere")
    older = str(out / "step_000003")
    assert f"{out / 'step_000004'} is newer than {older}" in refusal(config, resume=older)
    assert "dtype=float32 and not float64" in refusal(config, dtype="float32")
    assert "steps=3 is less than the 4 of" in refusal(config, steps=3)


def test_a_path_branches_off_into_a_new_folder(config: TrainConfig, tmp_path: Path) -> None:
    whole = trained(config, 1, 1, 0, keep=STEPS)
    out, older = tmp_path / "branch", tmp_path / "run" / "step_000002"
    rest = trained(config, 2, 1, 0, out=out, resume=str(older))
    assert list(rest) == [3, 4, 5, 6]
    assert rest == pytest.approx({step: whole[step] for step in rest}, rel=1e-10)


def test_without_out_the_unfinished_run_of_the_same_command_is_found(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(trained(config, 1, 1, 2, out=None)) == [1, 2]
    assert list(trained(config, 1, 1, 0, out=None, seed=2)) == [1, 2, 3, 4, 5, 6]
    assert list(trained(config, 1, 1, 0, out=None)) == [3, 4, 5, 6]
    assert list(trained(config, 1, 1, 0, out=None)) == [1, 2, 3, 4, 5, 6]
    assert sorted(run.name for run in Path("out").iterdir()) == ["run-001", "run-002", "run-003"]


def test_more_steps_go_on_from_a_finished_run(config: TrainConfig, tmp_path: Path) -> None:
    trained(config, 1, 1, 0)
    assert list(trained(config, 1, 1, 0, steps=STEPS + 2)) == [7, 8]
    assert list(trained(config, 1, 1, 0, steps=STEPS + 2)) == []


def test_the_command_lists_verifies_and_exports(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(config, 2, 1, 0)
    run, out = tmp_path / "run", tmp_path / "weights.safetensors"
    assert checkpoint_command.main(["ls", str(run)]) == 0
    assert checkpoint_command.main(["verify", str(run)]) == 0
    assert checkpoint_command.main(["export", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "step_000005" in printed
    assert "step_000006: sound, 2 files" in printed
    with safe_open(out, "pt") as exported:
        assert exported.metadata() == {"step": str(STEPS)}
    ours, held = load_file(out), state(run / "step_000006")
    assert set(ours) == {name for name in held if "/" not in name}
    assert all(torch.equal(held[n].reshape(ours[n].shape), ours[n]) for n in ours)
    assert ours["blocks.0.attention.query_key_value.weight"].shape == (3 * 16, 16)
    with pytest.raises(ConfigError, match="is there already"):
        checkpoint_command.main(["export", str(run), "--out", str(out)])
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoint_command.main(["ls", str(tmp_path)])
    assert not capsys.readouterr().out
    with pytest.raises(ConfigError, match="invalid choice: 'remove'"):
        checkpoint_command.main(["remove", str(run)])
    with pytest.raises(SystemExit, match="^0$"):
        checkpoint_command.main(["--help"])
    assert re.search(r"export +Writes the weights", capsys.readouterr().out)
    file = run / "step_000006" / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint_command.main(["verify", str(run)]) == 1
    assert "rank_00001.safetensors has" in capsys.readouterr().out
    other = str(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=rf"rank_00001\.safetensors has .* give {run} instead"
    ):
        checkpoint_command.main(["export", str(run / "step_000006"), "--out", other])
    assert checkpoint_command.main(["export", str(run), "--out", other]) == 0
    printed = capsys.readouterr().out
    assert "rank_00001.safetensors has" in printed
    assert "tensors of step_000005" in printed


def test_a_manifest_is_json_and_says_what_the_issue_of_trust_needs(
    config: TrainConfig, tmp_path: Path
) -> None:
    trained(config, 2, 1, 1)
    values = json.loads((tmp_path / "run" / "step_000001" / "manifest.json").read_text())
    assert list(values) == ["format", "progress", "files", "tensors", "sha256"]
    embedding = values["tensors"]["token_embedding.weight"]
    assert embedding["shape"] == [8, 16]
    whole = {"file": "rank_00000.safetensors", "first": [0, 0], "size": [8, 16]}
    assert embedding["slices"] == [whole]
    fused = values["tensors"]["blocks.0.attention.query_key_value.weight/exp_avg"]
    assert fused["shape"] == [3, 16, 16]
    assert [one["first"] for one in fused["slices"]] == [[0, 0, 0], [0, 8, 0]]
    assert [one["size"] for one in fused["slices"]] == [[3, 8, 16], [3, 8, 16]]
