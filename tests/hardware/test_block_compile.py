"""Compiled blocks compute what the oracle does, and where they cannot be the user is told."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_all_equal, assert_equal, dense_model, gradients, random_batch, tiny_config
from runs import train_here
from torch._dynamo.utils import counters

from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, PrecisionConfig, TrainConfig
from rosetrainer.hardware.block_compile import compile_blocks, compiles, missing_tool
from rosetrainer.models.build import build_model
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import ParallelContext
from rosetrainer.parallel.dropout import DropoutSeed
from rosetrainer.parallel.sharding import gather_whole, load_whole
from rosetrainer.proof.oracles import build_reference
from rosetrainer.validation import ConfigError

CPU = torch.device("cpu")
# torch's compiler warns of what itself does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_compute_what_the_oracle_does(recompute: str, padded: bool) -> None:
    config = tiny_config(n_layers=3)
    dense = dense_model(config)
    input_ids, labels = random_batch(config, rows=3)
    mask = None
    if padded:
        mask = torch.ones_like(input_ids)
        mask[1, :4] = 0
    dense_logits, dense_loss = dense(input_ids, mask, labels)
    dense_loss.backward()

    context = ParallelContext(recompute=recompute)
    model = GPTModel(config, context).double()
    load_whole(model, dense.state_dict())
    names = list(model.state_dict())
    compile_blocks(model.blocks, backend="aot_eager")
    assert list(model.state_dict()) == names
    for step in (0, 1):  # the number of a step is no reason to compile again
        model.zero_grad()
        logits, loss = model(input_ids, mask, labels, seed=DropoutSeed(1, step))
        assert logits is not None and loss is not None
        loss.backward()
    real = slice(None) if mask is None else mask.bool()
    assert_equal("logits", logits[real], dense_logits[real])
    assert_equal("loss", loss, dense_loss)
    assert_all_equal(gather_whole(model, gradients=True), gradients(dense))
    assert counters["stats"]["unique_graphs"] == 1, "one for all blocks"
    assert not counters["graph_break"]


def test_a_block_of_the_llama_family_is_one_graph_too() -> None:
    choices = {"architecture": "llama", "bias": False, "n_kv_heads": 2, "qk_norm": True}
    config = tiny_config(n_layers=3, d_head=6, **choices)
    dense = build_reference(config).double()
    input_ids, labels = random_batch(config, rows=3)
    dense_logits, dense_loss = dense(input_ids, labels=labels)
    dense_loss.backward()
    model = build_model(config).double()
    load_whole(model, dense.state_dict())
    compile_blocks(model.blocks, backend="aot_eager")
    logits, loss = model(input_ids, labels=labels)
    assert logits is not None and loss is not None
    loss.backward()
    assert_equal("logits", logits, dense_logits)
    for name, gradient in gradients(dense).items():
        assert_equal(name, gather_whole(model, gradients=True)[name], gradient)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.skipif(not os.environ.get("BENCH"), reason="make bench: half a minute of compiling")
@pytest.mark.skipif(bool(missing_tool(CPU)), reason=missing_tool(CPU))
def test_training_compiled_gives_the_same_losses(
    markov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor, "compile_threads", 1)  # two kernels are not worth more processes
    monkeypatch.setattr("rosetrainer.training.trainer.evaluate", lambda *_: None)
    losses = {}
    for wanted in ("off", "on"):
        config = TrainConfig(
            GPTConfig(context_length=16, n_layers=2, n_heads=2, d_model=32),
            optim=OptimConfig(warmup_steps=0, global_batch_size=4, micro_batch_size=2),
        ).with_settings(data=markov, out=tmp_path / wanted, steps=3, compile=wanted)
        config = config.with_settings(dtype="float32", checkpoint_every=0)
        losses[wanted] = train_here(config, 1, 0)
        assert bool(counters["stats"]) == (wanted == "on")
    assert losses["on"].keys() == losses["off"].keys() == {1, 2, 3}
    for step, loss in losses["on"].items():
        assert loss == pytest.approx(losses["off"][step], rel=8 * torch.finfo(torch.float32).eps)


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "tensor parallel": (2, {}, "tp_size=2, whose blocks hold collectives; tp_size can be 1"),
    "dropout": (1, {"model": GPTConfig(dropout=0.1)}, "dropout=0.1, whose masks are keyed"),
    "complex numbers": (
        1,
        {"model": GPTConfig(architecture="rotary", tied=False)},
        "architecture=rotary, which turns by complex numbers; architecture can be gpt2",
    ),
    "attention again": (
        1,
        {"parallel": ParallelConfig(recompute="attention")},
        "recompute=attention, a part of a block; recompute can be none or block",
    ),
    "same bits": (
        1,
        {"precision": PrecisionConfig(deterministic=True)},
        "deterministic=True, as kernels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_or_left_as_it_is(case: str) -> None:
    tp_size, parts, reason = REFUSED[case]
    config = replace(TrainConfig(), **parts)
    on, off = (config.with_settings(compile=c) for c in ("on", "off"))
    with pytest.raises(ConfigError, match="compile=on does not go with ") as caught:
        compiles(on, tp_size, CPU)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert compiles(config, tp_size, torch.device("cuda")) == (
        False,
        str(caught.value)
        .replace("=on does", "=auto is off: it does")
        .removesuffix("; or use --compile off"),
    )
    assert compiles(off, tp_size, CPU) == compiles(config, tp_size, CPU) == (False, "")


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    on = TrainConfig().with_settings(compile="on")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="a machine without (g|clang)\\+\\+; install one, or set"):
        compiles(on, 1, CPU)
    monkeypatch.setenv("CXX", "/opt/no such/compiler")
    with pytest.raises(ConfigError, match="without /opt/no; install one, or set CXX"):
        compiles(on, 1, CPU)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: None)
    with pytest.raises(ConfigError, match=r"a Python without Python\.h; install its headers"):
        compiles(on, 1, CPU)
    monkeypatch.setattr("rosetrainer.hardware.block_compile.find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    with pytest.raises(ConfigError, match=r"a GPU older than Volta, for .*; it needs 7\.0; or use"):
        compiles(on, 1, torch.device("cuda"))
