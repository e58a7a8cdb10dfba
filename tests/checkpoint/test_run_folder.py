"""Run folders: what is saved loads in any layout, and what is broken is named."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import dense_model, tiny_config
from ranks import run_ranks

from rosetrainer.checkpoint import run_folder
from rosetrainer.checkpoint.manifest import CheckpointError, Progress, found_in
from rosetrainer.checkpoint.saver import Saver
from rosetrainer.commands.prepare import main as prepare
from rosetrainer.config import TrainConfig
from rosetrainer.models.gpt import GPTModel
from rosetrainer.optim.optimizer import build_optimizer
from rosetrainer.parallel.context import ParallelContext, init_tensor_parallel
from rosetrainer.parallel.sharding import gather_whole, init_weights, load_whole
from rosetrainer.training.trained import load_model
from rosetrainer.validation import ConfigError

META = {"tokenizer": "bytes", "vocab_size": 256}


def save(folder: Path) -> None:
    """Saves the oracle's weights from this layout, as a run of seven steps would."""
    context = init_tensor_parallel()
    config = TrainConfig(model=tiny_config(vocab_size=256))
    model = GPTModel(config.model, context)
    load_whole(model, dense_model(config.model).state_dict())
    if context.rank == 0:
        run_folder.describe_run(folder, config, folder)
    save_checkpoint(folder, model, context, config)


def save_checkpoint(
    folder: Path, model: GPTModel, context: ParallelContext, config: TrainConfig
) -> None:
    optimizer = build_optimizer(model, config.optim)
    progress = Progress(7, 7, 0, 7, "float32", {}, config)
    Saver(folder, "once", model, optimizer, context, config.checkpoint).save(progress)


def load(folder: Path) -> bool:
    """Whether the weights that `generate` loads into this layout, gathered, are the oracle's."""
    context = init_tensor_parallel()
    config, _ = run_folder.read_run(folder)
    model = load_model(folder, config.model, context)
    expected = dense_model(config.model).float().state_dict()
    gathered = gather_whole(model)
    return all(torch.equal(gathered[name], expected[name]) for name in expected)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "meta.json").write_text(json.dumps(META))
    return tmp_path


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_weights_load_at_another_tp_size_bitwise(run: Path, saved_at: int, loaded_at: int) -> None:
    run_ranks(saved_at, save, run)
    assert run_ranks(loaded_at, load, run) == [True] * loaded_at


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In words on stderr, for stdout is for the text; one that was named is refused."""
    save(run)
    shutil.copytree(run / "step_000007", run / "step_000009")
    assert load(run)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "step_000009/manifest.json is damaged: it is of step 7; trying" in captured.err
    model = tiny_config(vocab_size=256)
    with pytest.raises(CheckpointError, match=f"give {run} instead") as caught:
        load_model(run / "step_000009", model, ParallelContext())
    assert "\n" not in str(caught.value)
    (run / "step_000007" / "rank_00000.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=f"no checkpoint of {run} is sound"):
        load_model(run, model, ParallelContext())


def test_broken_files_are_named(run: Path) -> None:
    save(run)
    values = json.loads((run / "config.json").read_text())
    values["model"]["n_head"] = 4
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: model has unknown keys n_head"):
        run_folder.read_run(run)
    for broken in ("{", "[" * 100_000):
        (run / "config.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"config\.json cannot be read: .* copied whole"):
            run_folder.read_run(run)
    (run / "config.json").write_text('{"run": {}}')
    with pytest.raises(ConfigError, match=r"config\.json lacks model, parallel, optim: it is of"):
        run_folder.read_run(run)


def test_a_config_comes_back_as_it_was(run: Path) -> None:
    save(run)
    config, _ = run_folder.read_run(run)
    assert config == TrainConfig(model=tiny_config(vocab_size=256))


def test_run_folders_are_numbered_and_never_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [run_folder.new_run_folder(None).name for _ in range(3)]
    assert names == ["run-001", "run-002", "run-003"]
    mine = run_folder.new_run_folder(Path("deep/er"))
    (mine / "note").write_text("kept")
    with pytest.raises(ConfigError, match="out=deep/er is not empty"):
        run_folder.new_run_folder(Path("deep/er"))
    with pytest.raises(ConfigError, match="out=deep/er/note is not empty"):
        run_folder.check_run_folder(Path("deep/er/note"))
    with pytest.raises(ConfigError, match="deep/er/note/x cannot be made"):
        run_folder.check_run_folder(Path("deep/er/note/x"))
    with pytest.raises(ConfigError, match="out=none/../deep/er/note/x cannot be made: "):
        run_folder.new_run_folder(Path("none/../deep/er/note/x"))


def test_the_latest_run_is_the_one_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run with a checkpoint in out/"):
        run_folder.latest_run()
    for age, name in ((5, "run-002"), (9, "run-001")):
        manifest = Path("out") / name / "step_000007" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_bytes(b"")
        os.utime(manifest, (1000 - age, 1000 - age))
    Path("out/run-003").mkdir()  # nothing saved yet
    assert run_folder.latest_run() == Path("out/run-002")


def test_a_bpe_corpus_s_tokenizer_travels_with_the_run(tmp_path: Path) -> None:
    text, corpus, run = tmp_path / "text", tmp_path / "corpus", tmp_path / "run"
    text.write_text("the rank that waits, and the rank that it waits for\n" * 40)
    flags = ["--tokenizer", "bpe", "--vocab-size", "270", "--out", str(corpus)]
    prepare(["file", str(text), *flags])
    run.mkdir()
    config = TrainConfig(model=tiny_config(vocab_size=270))
    model = GPTModel(config.model)
    init_weights(model, seed=1)
    run_folder.describe_run(run, config, corpus)
    save_checkpoint(run, model, ParallelContext(), config)
    _, tokenizer = run_folder.read_run(run)
    ids = tokenizer.encode("the rank that waits")
    assert tokenizer.decode(ids) == "the rank that waits"
    assert len(ids) < 10


def test_a_model_of_others_may_have_ids_behind_those_of_its_tokenizer(run: Path) -> None:
    """No text has them, but the model may write one."""
    save(run)
    config = TrainConfig(model=tiny_config(vocab_size=300))
    for init_from in (run, None):
        run_folder.describe_run(run, config.with_settings(init_from=init_from), run)
        if init_from:
            _, tokenizer = run_folder.read_run(run)
            assert tokenizer.decode([104, 299, 105]) == "hi"
        else:
            with pytest.raises(ConfigError, match="has 256 tokens and the model 300: they are of"):
                run_folder.read_run(run)


def test_files_of_different_runs_are_told_apart(run: Path) -> None:
    save(run)
    (run / "meta.json").write_text(
        json.dumps({"tokenizer": "chars", "characters": "ab"} | {"vocab_size": 2})
    )
    with pytest.raises(ConfigError, match="has 2 tokens and the model 256: they are of different"):
        run_folder.read_run(run)
    (run / "meta.json").write_text(json.dumps(META))
    other = replace(tiny_config(vocab_size=256), d_ff=48)
    shapes = r"dense_h_to_4h.weight is float32 \(40, 24\), the model's float32 \(48, 24\)"
    with pytest.raises(CheckpointError, match=shapes):
        load_model(run, other, ParallelContext())


def test_an_out_that_leads_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="out=out cannot be made in"):
        run_folder.check_run_folder(None)
    with pytest.raises(ConfigError, match="cannot make out/run-001"):
        run_folder.new_run_folder(None)
    Path("loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="out=loop/run cannot be made in"):
        run_folder.check_run_folder(Path("loop/run"))
    assert found_in(Path("loop")) == []
