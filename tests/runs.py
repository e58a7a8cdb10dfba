"""Small training runs in this process, which tests break and look into."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import LONGEST_SECONDS
from safetensors.torch import save_file

from rosetrainer.checkpoint.manifest import check_files, read_manifest
from rosetrainer.checkpoint.saver import read_whole
from rosetrainer.commands import train as train_command
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.launch.rank import STOP
from rosetrainer.training import trainer
from rosetrainer.training.setup import check_config, train

MODEL = GPTConfig(context_length=16, n_layers=2, n_heads=4, d_model=32)


def config_for(data: Path, out: Path, **run: object) -> TrainConfig:
    values: dict[str, object] = {"steps": 6, "eval_every": 3, "eval_tokens": 9 * 16} | run
    return TrainConfig(
        MODEL,
        ParallelConfig(),
        OptimConfig(warmup_steps=2, global_batch_size=8, micro_batch_size=2),
    ).with_settings(data=data, out=out, **values)


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved."""


def tiny(data: Path, out: Path, **run: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 5, "eval_every": 3, "checkpoint_every": 2, "device": "cpu"}
    return TrainConfig(
        GPTConfig(context_length=8, n_layers=1, n_heads=2, d_model=8),
        optim=OptimConfig(warmup_steps=2, global_batch_size=2),
    ).with_settings(data=data, out=out, eval_tokens=16, **(values | run))


def run_once(config: TrainConfig, killed_in: int = 0) -> None:
    original = trainer.train_step

    def train_step(*arguments: Any) -> dict[str, float]:
        if arguments[-1] + 1 == killed_in:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", train_step)
        patch.setattr("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0)
        try:
            train(*check_config(config, 1))
        except Killed:
            assert killed_in


def listened(config: TrainConfig, said: Path) -> None:
    """A run on as many ranks as there are; what rank 0 says of it goes to a file."""

    def write(_: object, line: str) -> None:
        with said.open("a") as file:
            file.write(line + "\n")

    checked = check_config(config, int(os.environ["WORLD_SIZE"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rosetrainer.reporting.run_log.RunLog.say", write)
        patch.setattr("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0)  # it takes 0.3 s
        train(*checked)


STEPS = 6


def train_here(config: TrainConfig, world: int, stop_after: int) -> dict[int, float]:
    found = {}
    original = trainer.train_step

    def train_step(*arguments: Any) -> dict[str, float]:
        figures = original(*arguments)
        found[arguments[-1] + 1] = figures["train/loss"]
        if arguments[-1] + 1 == stop_after:
            STOP.signal = signal.SIGTERM
        return figures

    def slow_save(*arguments: Any) -> None:
        """Ends after training has gone on, where it goes on."""
        steps, end = len(found), time.monotonic() + LONGEST_SECONDS
        while len(found) == steps < STEPS and STOP.signal is None and time.monotonic() < end:
            time.sleep(0.01)
        save_file(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", train_step)
        if config.checkpoint.async_checkpoint:
            patch.setattr("rosetrainer.checkpoint.slices.save_file", slow_save)
        patch.setattr("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0)  # it takes 0.3 s
        train(*check_config(config, world))
    return found


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All parameters and moments, whole."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return {name: read_whole(folder, manifest, name) for name in manifest.tensors}


FLAGS = ("--global-batch-size", "4", "--context-length", "16", "--eval-tokens", "32")


def losses(data: Path, folder: Path, out: Path, *more: str) -> list[float]:
    """Of three steps, by the command's own flags."""
    world = int(os.environ["WORLD_SIZE"])
    argv = ["--data", str(data), "--init-from", str(folder), "--out", str(out), "--steps", "3"]
    command = train_command.parse_command([*argv, *FLAGS, "--dtype", "float32", *more])
    found, original = [], trainer.train_step

    def train_step(*arguments: Any) -> dict[str, float]:
        found.append(original(*arguments))
        return found[-1]

    with (
        mock.patch.object(trainer, "train_step", train_step),
        mock.patch("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0),
    ):
        train(*check_config(command.config, world))
    return [figures["train/loss"] for figures in found]
