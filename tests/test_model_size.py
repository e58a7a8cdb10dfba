"""Sizes that no machine has a place for are one line, from every command that reads them."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rosetrainer import model_size
from rosetrainer.checkpoint.manifest import (
    CheckpointError,
    checkpoints,
    read_manifest,
    with_own_hash,
)
from rosetrainer.commands import checkpoint as checkpoint_command
from rosetrainer.commands import generate, parity, plan
from rosetrainer.commands import train as train_command
from rosetrainer.config import GPTConfig, OptimConfig, TrainConfig
from rosetrainer.model_size import parameter_count
from rosetrainer.models.build import ARCHITECTURES, build_model
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.sharding import shard_spec
from rosetrainer.training.setup import check_config, train
from rosetrainer.validation import ConfigError

SMALL = GPTConfig(context_length=8, n_layers=1, n_heads=2, d_model=16)
HUGE = 2**40


@pytest.fixture(scope="module")
def run(markov: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(SMALL, optim=OptimConfig(global_batch_size=1)).with_settings(
        data=markov, out=out, steps=1, eval_tokens=8, threads=1, dtype="float32"
    )
    train(*check_config(config, 1))
    return out


def refused(main: Callable[[list[str]], Any], *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        main(list(flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


META = ParallelContext(device=torch.device("meta"))


@pytest.mark.parametrize("architecture", ["gpt2", "rotary", "transformer_xl"])
def test_parameters_are_counted_without_building_them(architecture: Any) -> None:
    for tied, bias, heads in itertools.product((True, False), (True, False), (2, 3)):
        if architecture == "rotary" and tied:
            continue
        shape = {"n_layers": 3, "d_model": 24, "d_head": 6, "d_ff": 22, "n_heads": heads}
        how = {"tied": tied, "bias": bias, "architecture": architecture}
        config = GPTConfig(139, 10, **shape, **how)  # type: ignore[arg-type]
        specs = [shard_spec(parameter) for parameter in build_model(config, META).parameters()]
        whole = [torch.empty(spec.dense_shape, device="meta").numel() for spec in specs]
        assert parameter_count(config) == sum(whole)


LLAMAS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 1, "qkv_bias": True, "qk_norm": True, "norm": "none"},
    {"n_kv_heads": 2, "bias": True, "norm": "layernorm", "tied": True},
    {"dense_bias": True, "activation": "relu", "d_ff": 22},
    {"bias": True, "activation": "gelu"},
]


@pytest.mark.parametrize("changes", LLAMAS, ids=str)
def test_parameters_of_the_llama_family_are_counted_alike(changes: dict[str, Any]) -> None:
    shape = {"n_layers": 3, "n_heads": 4, "d_model": 24, "d_head": 6}
    how = {"architecture": "llama", "bias": False, "tied": False}
    config = GPTConfig(139, 10, **{**shape, **how, **changes})
    model = build_model(config, ParallelContext(device=torch.device("meta")))
    whole = [math.prod(shard_spec(parameter).dense_shape) for parameter in model.parameters()]
    assert parameter_count(config) == sum(whole)


ABSURD = [
    ("n_layers", HUGE, "n_layers=1099511627776 must be from 1 to 16384"),
    ("d_model", HUGE, "d_model=1099511627776, .* parameters; they can be 1,125,899,906,842,624"),
    ("d_ff", HUGE, "d_ff=1099511627776 make .* parameters"),
    ("d_head", HUGE, "d_head=1099511627776 and .* parameters"),
    ("n_heads", HUGE, "n_heads=1099511627776"),
    ("context_length", HUGE, "context_length=1099511627776 must be from 1 to 16777216"),
    ("d_model", 10**300, "d_model=an integer of 301 digits must be from 1 to 1099511627776"),
]
LARGE = ("--d-model", "1048576", "--n-layers", "16")  # 2e14 parameters: more than any memory


@pytest.mark.parametrize(("name", "value", "message"), ABSURD)
def test_absurd_sizes_are_refused_by_every_command_that_takes_them(
    name: str, value: int, message: str, markov: Path
) -> None:
    flags, corpus = [f"--{name.replace('_', '-')}", str(value)], ["--data", str(markov)]
    for main, more in ((train_command.main, corpus), (parity.main, []), (plan.main, corpus)):
        assert re.search(message, refused(main, *flags, *more))


@pytest.mark.parametrize(
    ("name", "value"), [*(absurd[:2] for absurd in ABSURD), ("vocab_size", HUGE)]
)
def test_absurd_sizes_in_a_run_s_files_are_refused(
    run: Path, tmp_path: Path, name: str, value: int
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["model"][name] = value
    (copy / "config.json").write_text(json.dumps(config))
    told = refused(generate.main, "--run", str(copy))
    assert re.search(f"^{name}=|, {name}=| {name}=|GiB of memory|the model {value}: they are", told)
    step = checkpoints(copy)[0]
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["progress"]["config"]["model"][name] = value
    (step / "manifest.json").write_bytes(with_own_hash(manifest))
    out = tmp_path / "out.safetensors"
    told = refused(checkpoint_command.main, "export", str(copy), "--out", str(out))
    assert re.search("no checkpoint of .* is sound|does not hold .* as its own config", told)
    assert not out.exists()


def test_a_manifest_of_tensors_larger_than_its_files_is_refused(run: Path, tmp_path: Path) -> None:
    step = shutil.copytree(checkpoints(run)[0], tmp_path / checkpoints(run)[0].name)
    manifest = json.loads((step / "manifest.json").read_text())
    tensor = manifest["tensors"]["blocks.0.attention.dense.weight"]
    tensor["shape"] = [HUGE, HUGE]
    tensor["slices"][0]["size"] = [HUGE, HUGE]
    (step / "manifest.json").write_bytes(with_own_hash(manifest))
    with pytest.raises(CheckpointError, match="more than its files have bytes"):
        read_manifest(step)


def test_what_does_not_fit_into_memory_is_told_with_both_numbers(markov: Path) -> None:
    has = f"{model_size.machine_memory() / 2**30:,.1f} GiB of memory"
    for main in (train_command.main, parity.main):
        told = refused(main, *LARGE, *(["--data", str(markov)] * (main is train_command.main)))
        assert told.startswith("the model's 211,") and told.endswith(f"{has}; try a smaller model")
    assert plan.main([*LARGE, "--data", str(markov)]) == 0  # which allocates nothing
    told = refused(plan.main, "--vocabulary", str(2**40), "--d-model", "16", "--n-heads", "1")
    assert "logits in a forward pass" in told


def test_weights_that_do_not_fit_are_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_size, "machine_memory", lambda: 1000)
    assert "for weights, and this machine has 0.0 GiB" in refused(generate.main, "--run", str(run))


def test_a_rank_of_many_machines_needs_its_own_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_size, "machine_memory", lambda: 4 * parameter_count(SMALL))
    model_size.check_memory(SMALL, 16, "training", 1 / 4)
    with pytest.raises(ConfigError):
        model_size.check_memory(replace(SMALL, d_ff=65), 16, "training", 1 / 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_decay_and_what_says_where_a_token_stands_does_not(architecture: Any) -> None:
    how: dict[str, dict[str, Any]] = {
        "rotary": {"tied": False},
        "llama": {"bias": False, "qk_norm": True, "n_kv_heads": 2},
        "t5": {"bias": False},
    }
    config = GPTConfig(32, 16, 2, 4, 16, architecture=architecture, **how.get(architecture, {}))
    specs = {
        name: shard_spec(parameter)
        for name, parameter in build_model(config, META).named_parameters()
    }
    places = ("position_embedding", "token_type_embedding", "encoder_bias", "decoder_bias")
    decayed = {
        name
        for name, spec in specs.items()
        if len(spec.dense_shape) == 2 and not any(place in name for place in places)
    }
    assert decayed == {name for name, spec in specs.items() if spec.decay}
    assert 0 < len(decayed) < len(specs) or architecture == "rotary"
