"""What evaluating, saving, loading and exporting hold: never the whole model on one rank.

A model that fits only because tensor parallelism divides it has to come through all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peak import Peak
from ranks import run_ranks
from safetensors.torch import load_file

from rosetrainer.checkpoint import saver
from rosetrainer.commands import checkpoint as checkpoint_command
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.sharding import gather_whole, shard_spec
from rosetrainer.training.setup import check_config, train
from rosetrainer.training.trained import load_model
from rosetrainer.training.trainer import Trainer

MODEL = GPTConfig(vocab_size=8, context_length=4, n_layers=6, n_heads=2, d_model=64)
Run = tuple[Path, list[dict[str, int]]]


def sizes(tp_size: int) -> tuple[int, int]:
    """The bytes of a rank's own slices, and of the largest whole tensor."""
    whole = dict(
        build_model(MODEL, ParallelContext(device=torch.device("meta"))).named_parameters()
    )
    largest = max(parameter.nbytes for parameter in whole.values())
    return sum(parameter.nbytes for parameter in whole.values()) // tp_size, largest


def config_for(data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        MODEL,
        ParallelConfig(tp_size=int(os.environ.get("WORLD_SIZE", "1"))),
        OptimConfig(global_batch_size=1, warmup_steps=1),
    ).with_settings(data=data, out=out, steps=2, eval_every=1, eval_tokens=4, dtype="float32")


def peaks_of_a_run(data: Path, out: Path) -> dict[str, int]:
    """The most bytes, besides weights and moments, while the run evaluates and while it saves."""
    found: dict[str, int] = {}

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any) -> Any:
            model = getattr(self, "model", None) or self._model
            optimizer = getattr(self, "optimizer", None) or self._optimizer
            moments = [one for state in optimizer.state.values() for one in state.values()]
            with Peak(*model.parameters(), *moments) as peak:
                result = original(self, *arguments)
            found[name] = max(found.get(name, 0), peak.bytes)
            return result

        return call

    with (
        mock.patch.object(Trainer, "evaluate", watched("evaluate", Trainer.evaluate)),
        mock.patch.object(saver.Saver, "save", watched("save", saver.Saver.save)),
        mock.patch("rosetrainer.training.setup.matmul_peak", lambda *_: 1.0),
    ):
        train(*check_config(config_for(data, out), int(os.environ["WORLD_SIZE"])))
    return found


def peak_of_loading(run: Path) -> int:
    context = init_parallel(ParallelConfig(tp_size=2), "cpu")
    with Peak() as peak:
        load_model(run, MODEL, context)
    return peak.bytes


def peak_of_gathering(run: Path) -> int:
    context = init_parallel(ParallelConfig(tp_size=2), "cpu")
    model = load_model(run, MODEL, context)
    with Peak(*model.parameters()) as peak:
        gather_whole(model)
    return peak.bytes


@pytest.fixture(scope="module")
def run(
    markov: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, int]]]:
    """A finished run of two tensor-parallel ranks, and what each held meanwhile."""
    out = tmp_path_factory.mktemp("memory") / "run"
    return out, run_ranks(2, peaks_of_a_run, markov, out)


def test_evaluating_and_saving_hold_less_than_one_whole_tensor_more(
    run: Run,
) -> None:
    own, largest = sizes(2)
    assert own > 5 * largest, "the whole model is no tensor"
    for peaks in run[1]:
        assert set(peaks) == {"evaluate", "save"}
        assert 0 < peaks["evaluate"] < largest
        assert peaks["save"] < largest


def test_generate_holds_its_own_slices_and_one_tensor(
    run: Run,
) -> None:
    own, largest = sizes(2)
    for peak in run_ranks(2, peak_of_loading, run[0]):
        assert own <= peak < own + 2 * largest


def test_control_gathering_the_whole_model_is_seen(
    run: Run,
) -> None:
    own, largest = sizes(2)
    assert min(run_ranks(2, peak_of_gathering, run[0])) > own + 2 * largest


def test_export_holds_one_whole_tensor_at_a_time(run: Run, tmp_path: Path) -> None:
    _, largest = sizes(1)
    out = tmp_path / "weights.safetensors"
    with Peak() as peak:
        checkpoint_command.main(["export", str(run[0]), "--out", str(out)])
    assert largest <= peak.bytes <= 2 * largest
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(out).items()}
    model = build_model(MODEL, ParallelContext(device=torch.device("meta")))
    assert shapes == {n: shard_spec(p).dense_shape for n, p in model.named_parameters()}
