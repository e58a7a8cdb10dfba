"""What a run and an export write can be read by whom the umask says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks import run_ranks

from rosetrainer.commands import checkpoint as checkpoint_command
from rosetrainer.commands.prepare import main as prepare
from rosetrainer.config import GPTConfig, OptimConfig, TrainConfig
from rosetrainer.training.setup import check_config, train


def write_everything(folder: Path, umask: int) -> dict[str, int]:
    """The mode of each file of a corpus, a run and an export, made under umask."""
    os.umask(umask)
    text, corpus, run = folder / "text", folder / "corpus", folder / "run"
    text.write_text("the rank that waits, and the rank that it waits for\n" * 40)
    prepare(["file", str(text), "--tokenizer", "bpe", "--vocab-size", "270", "--out", str(corpus)])
    config = TrainConfig(
        GPTConfig(context_length=8, n_layers=1, n_heads=2, d_model=8),
        optim=OptimConfig(global_batch_size=2),
    ).with_settings(data=corpus, out=run, steps=7, eval_tokens=8, profile=1, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0)
        train(*check_config(config, 1))
    checkpoint_command.main(["export", str(run), "--out", str(folder / "export.safetensors")])
    return {
        str(path.relative_to(folder)): path.stat().st_mode & 0o777
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    (modes,) = run_ranks(1, write_everything, tmp_path, umask)
    checkpoint = "run/step_000007"
    assert {"export.safetensors", "corpus/train.bin", f"{checkpoint}/rank_00000.safetensors"} <= {
        *modes
    }
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
