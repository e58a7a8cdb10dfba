"""The same proofs on a GPU, where there is one: `pytest tests/hardware/test_cuda.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import assert_all_equal, assert_equal, dense_model, gradients, random_batch
from runs import state, train_here

from rosetrainer.commands.prepare import main as prepare
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.hardware.block_compile import compile_blocks, compiles
from rosetrainer.hardware.performance import choose_dtype
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import ParallelContext, init_parallel
from rosetrainer.parallel.dropout import Dropout, DropoutSeed
from rosetrainer.parallel.sharding import gather_whole, load_whole
from rosetrainer.proof.tolerances import prove
from rosetrainer.proof.trajectory import Proof
from rosetrainer.training.setup import check_config, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
    pytest.mark.filterwarnings("default"),  # torch's compiler and Triton warn of what they do
]
MODEL = GPTConfig(context_length=16, n_layers=2, n_heads=4, d_model=64)


def test_one_gpu_computes_what_the_oracle_does() -> None:
    context = init_parallel(TrainConfig().parallel, "cuda")
    for dropout, recompute in ((0.0, "none"), (0.1, "attention"), (0.1, "block")):
        again = replace(context, recompute=recompute)
        config = replace(MODEL, dropout=dropout)
        columns = prove(Proof(config, again, OptimConfig()), torch.bfloat16)
        assert [column.wrong for column in columns] == [[], []]


def test_dropout_s_masks_are_those_of_the_cpu() -> None:
    layer, seed = Dropout(0.1), DropoutSeed(seed=1, step=2, first_row=3)
    x = torch.ones(5, 7, 33)
    assert torch.equal(layer(x.cuda(), seed, (4,)).cpu(), layer(x, seed, (4,)))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_one_gpu_trains(tmp_path: Path, dtype: str) -> None:
    prepare(["markov", "--out", str(tmp_path / "markov")])
    config = TrainConfig(MODEL, optim=OptimConfig(learning_rate=1e-2)).with_settings(
        data=tmp_path / "markov", out=tmp_path / "run", steps=30, dtype=dtype
    )
    model, _ = train(*check_config(config, 1))
    assert model.token_embedding.weight.device.type == "cuda"
    assert choose_dtype("float32", torch.device("cuda")) == torch.float32
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(log) == 31


def test_auto_takes_what_is_fast_here() -> None:
    device = torch.device("cuda", 0)
    assert compiles(TrainConfig(), 1, device)[0]
    assert choose_dtype("auto", device) == torch.bfloat16


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_training_gives_the_same_losses(
    tmp_path: Path, dtype: str, recompute: str
) -> None:
    prepare(["markov", "--out", str(tmp_path / "markov")])
    losses = {}
    for wanted in ("off", "on"):
        shared = {"data": tmp_path / "markov", "steps": 6, "checkpoint_every": 0}
        parallel = ParallelConfig(recompute=recompute)  # type: ignore[arg-type]
        optim = OptimConfig(warmup_steps=0, micro_batch_size=4)
        losses[wanted] = train_here(
            TrainConfig(MODEL, parallel, optim).with_settings(
                out=tmp_path / wanted, dtype=dtype, compile=wanted, **shared
            ),
            1,
            0,
        )
    assert losses["on"].keys() == losses["off"].keys() == set(range(1, 7))
    # Six updates on: an update of Adam's can turn a rounding of a gradient near zero into a step.
    tolerance = {"float32": 1e-4, "bfloat16": 8 * torch.finfo(torch.bfloat16).eps}[dtype]
    for step, loss in losses["on"].items():
        assert loss == pytest.approx(losses["off"][step], rel=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_head_and_loss_of_a_whole_vocabulary_are_the_oracle_s(compiled: bool) -> None:
    config = GPTConfig(50257, context_length=66, n_layers=1, n_heads=2, d_model=32)
    dense = dense_model(config)
    input_ids, labels = random_batch(config, rows=3)
    _, dense_loss = dense(input_ids, None, labels)
    dense_loss.backward()
    context = ParallelContext(device=torch.device("cuda", 0))
    model = GPTModel(config, context).double()
    load_whole(model, dense.state_dict())
    if compiled:
        compile_blocks(model.blocks)
    _, loss = model(input_ids.cuda(), labels=labels.cuda(), return_logits=False)
    assert loss is not None
    assert_equal("loss", loss.cpu(), dense_loss)
    loss.backward()
    ours = gather_whole(model, gradients=True)
    assert_all_equal({name: tensor.cpu() for name, tensor in ours.items()}, gradients(dense))


def test_a_profile_shows_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(["markov", "--out", str(tmp_path / "markov")])
    config = TrainConfig(MODEL).with_settings(
        data=tmp_path / "markov", out=tmp_path / "run", steps=8, profile=2
    )
    train(*check_config(config, 1))
    trace = json.loads((tmp_path / "run" / "trace_rank_00000.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    (_, told) = capsys.readouterr().out.split("profile of 2 steps: ")
    title, first, *_ = told.splitlines()[1:]
    assert title.startswith("own time on the CUDA ")
    assert not first.startswith("aten::")  # a kernel, not what launched it
    assert float(first.split()[-3]) > 0


def test_a_deterministic_run_goes_on_bitwise(tmp_path: Path) -> None:
    prepare(["markov", "--out", str(tmp_path / "markov")])
    shared = {"data": tmp_path / "markov", "steps": 6, "eval_every": 0, "deterministic": True}
    losses: dict[str, dict[int, float]] = {}
    for name, stops in (("whole", [0]), ("resumed", [3, 0])):
        config = TrainConfig(replace(MODEL, dropout=0.1)).with_settings(
            out=tmp_path / name, checkpoint_every=1, **shared
        )
        losses[name] = {}
        for stop in stops:
            losses[name] |= train_here(config, 1, stop)
    assert losses["resumed"] == losses["whole"]
    ours, expected = (state(tmp_path / name / "step_000006") for name in losses)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
