"""The training run as a user starts it: what it writes, and that every layout trains the same."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from machine import like
from oracle import assert_all_equal, saved_weights
from ranks import LONGEST_SECONDS, run_ranks
from runs import MODEL, config_for

from rosetrainer.checkpoint.manifest import checkpoints, step_of
from rosetrainer.commands.prepare import main as prepare
from rosetrainer.commands.train import main, parse_command
from rosetrainer.config import GPTConfig, OptimConfig, ParallelConfig, TrainConfig
from rosetrainer.data.batches import open_corpus
from rosetrainer.environment import python_command
from rosetrainer.models.gpt import GPTModel
from rosetrainer.parallel.context import Axis, ParallelContext, init_tensor_parallel
from rosetrainer.reporting.run_log import _rounded
from rosetrainer.training.evaluation import evaluate
from rosetrainer.training.setup import check_config, sum_over_ranks, train
from rosetrainer.training.step import micro_batches
from rosetrainer.validation import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--context-length", "16", "--n-layers", "1", "--d-model", "16", "--steps", "2"]


def train_on_ranks(config: TrainConfig, dp_size: int) -> None:
    from dataclasses import replace

    world_size = int(os.environ["WORLD_SIZE"])
    config = replace(config, parallel=ParallelConfig(dp_size=dp_size))
    train(*check_config(config, world_size))


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_layout_trains_the_same_and_writes_the_same_weights(
    markov: Path, tmp_path: Path
) -> None:
    curves, weights = {}, {}
    for dp_size, tp_size in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
        out = tmp_path / f"dp{dp_size}tp{tp_size}"
        config = config_for(markov, out, dtype="float64")
        run_ranks(dp_size * tp_size, train_on_ranks, config, dp_size)
        curves[out.name] = [
            value
            for line in read_log(out)
            for tag, value in line.items()
            if tag.startswith(("train/", "val/"))
        ]
        weights[out.name] = saved_weights(out)
    alone, alone_weights = curves.pop("dp1tp1"), weights.pop("dp1tp1")
    assert len(alone) == 6 * 3 + 2 * 2
    for name, curve in curves.items():
        assert curve == pytest.approx(alone, abs=1.1e-6), name  # the log has six decimals
        assert_all_equal(weights[name], alone_weights)


def test_a_run_leaves_its_files_beside_each_other(markov: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    run_ranks(2, train_on_ranks, config_for(markov, out, dtype="float32"), 1)
    names = {path.name.split(".")[0] for path in out.iterdir()}
    assert names == {"config", "log", "meta", "events", "loss", "step_000006", ""}
    assert [path.name for path in out.glob(".*")] == [".lock"]
    saved = json.loads((out / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 8
    events = EventAccumulator(str(out))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s"} <= tags
    assert {"perf/mfu", "comm/bytes_per_step/tp_all_reduce", "val/above_floor"} <= tags
    moved = {line.get("comm/bytes_per_step/tp_all_reduce") for line in read_log(out)} - {None}
    # For all 8 x 16 tokens, whatever the micro-batches: two all-reduces of (b, T, D) each way in
    # each block, one each way for embedding and head, three numbers a token for the loss; then who
    # has a gradient that is not finite, and the norm.
    tokens = 4 * 8 * 16
    assert moved == {2 * (2 * MODEL.n_layers + 1) * tokens * 32 + 3 * tokens + 8 + 8}


def products_of_a_run(config: TrainConfig, fast: bool) -> int:
    """How many products of training the rank left to oneDNN, where it is faster or is not."""
    from rosetrainer.hardware import measured, onednn

    with (
        mock.patch.object(measured, "machine", return_value=like(linear=fast)),
        mock.patch.object(onednn, "product", wraps=onednn.product) as product,
    ):
        train_on_ranks(config, dp_size=1)
    return product.call_count


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("fast", [True, False])
def test_fp32_runs_in_onednn_where_it_is_faster(markov: Path, tmp_path: Path, fast: bool) -> None:
    config = config_for(markov, tmp_path / "run", dtype="float32")
    (calls,) = run_ranks(1, products_of_a_run, config, fast)
    layers = 4 * MODEL.n_layers
    assert calls >= 2 * layers * config.run.steps if fast else calls == 0


def test_the_batch_is_one_inside_a_tp_group_and_another_in_each_dp_group(markov: Path) -> None:
    corpus = open_corpus(markov, 16)
    config = config_for(markov, Path("unused"))
    rows = {}
    for dp_rank in range(2):
        for tp_rank in range(2):
            context = ParallelContext(Axis("tp", 2, tp_rank), Axis("dp", 2, dp_rank))
            batches = micro_batches(config, corpus, context, step=5)
            assert [tuple(inputs.shape) for _, inputs, _ in batches] == [(2, 16)] * 2
            assert [first for first, _, _ in batches] == [2 * dp_rank, 2 * dp_rank + 4]
            rows[dp_rank, tp_rank] = torch.cat([inputs for _, inputs, _ in batches])
            for _, inputs, labels in batches:
                assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert torch.equal(rows[0, 0], rows[0, 1])
    assert torch.equal(rows[1, 0], rows[1, 1])
    alone = micro_batches(config, corpus, ParallelContext(), step=5)
    everything = torch.cat([inputs for _, inputs, _ in alone])
    both = torch.cat([rows[0, 0], rows[1, 0]])
    assert sorted(both.tolist()) == sorted(everything.tolist())
    assert len(set(map(tuple, both.tolist()))) == 8


def train_to_the_floor(config: TrainConfig) -> None:
    train(*check_config(config, 2))


def test_on_a_markov_chain_the_loss_comes_near_the_floor_and_not_under_it(
    markov: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        GPTConfig(context_length=32, n_layers=1, n_heads=4, d_model=64),
        optim=OptimConfig(learning_rate=1e-2, global_batch_size=32),
    ).with_settings(
        data=markov,
        out=tmp_path / "run",
        steps=320,
        eval_every=0,
        eval_tokens=60000,
        dtype="float32",
    )
    run_ranks(2, train_to_the_floor, config)
    last = read_log(tmp_path / "run")[-1]
    floor = json.loads((markov / "meta.json").read_text())["floor_nats"]
    assert last["val/loss"] == pytest.approx(floor + last["val/above_floor"], abs=2e-3)
    assert -0.005 < last["val/above_floor"] < 0.05


def test_a_model_that_sees_its_labels_is_reported_as_a_leak(markov: Path, tmp_path: Path) -> None:
    class Cheat(GPTModel):
        """Sees the label: almost all the probability on the right token."""

        def hidden(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            following = torch.roll(input_ids, -1, dims=1)
            return torch.nn.functional.one_hot(following, MODEL.d_model).float() * 5

    config = config_for(markov, tmp_path)
    corpus, model = open_corpus(markov, 16), Cheat(MODEL)
    model.output_head.weight.data = torch.eye(128, MODEL.d_model)
    found = evaluate(config, corpus, model, ParallelContext(), torch.no_grad)
    assert found
    _, remark = found
    assert "labels leak into the inputs" in remark


def refused(argv: list[str]) -> str:
    """The one line with which `train` refuses argv, before a process group starts."""
    with pytest.raises(ConfigError) as caught:
        main(argv)
    assert not torch.distributed.is_initialized()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.prints_commands
def test_mistakes_are_one_line_each(markov: Path, tmp_path: Path) -> None:
    data = ["--data", str(markov)]
    assert refused([*data, "--nproc", "3"]) == (
        "n_heads=4 is not divisible by tp_size=3; tp_size can be 1, 2 or 4"
    )
    assert refused([*data, "--nproc", "4", "--d-ff", "6"]) == (
        "d_ff=6 is not divisible by tp_size=4; tp_size can be 1 or 2"
    )
    assert "world size 2 is not tp_size x dp_size = 2 x 2; start 4 ranks" in refused(
        [*data, "--nproc", "2", "--tp-size", "2", "--dp-size", "2"]
    )
    assert refused(["--tp-size", "2", "--steps", "3"]) == (
        "2 ranks are asked for, and this is one; "
        f"run: {python_command()} -m rosetrainer train --nproc 2 --tp-size 2 --steps 3"
    )
    assert "unknown argument --tp-siz; did you mean --tp-size?" in refused(["--tp-siz", "2"])
    assert "global_batch_size=3 is not divisible by dp_size=2; dp_size can be 1 or 3" in refused(
        [*data, "--nproc", "2", "--dp-size", "2", "--global-batch-size", "3"]
    )
    assert " -m rosetrainer prepare" in refused(["--data", str(tmp_path / "nowhere")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is not empty; choose another --out" in refused([*data, "--out", str(tmp_path / "full")])
    if not torch.cuda.is_available():
        assert "torch finds no GPU" in refused([*data, "--device", "cuda"])


def test_a_broken_tokenizer_is_found_before_training(tmp_path: Path) -> None:
    text, corpus = tmp_path / "text", tmp_path / "corpus"
    text.write_text("the rank that waits, and the rank that it waits for\n" * 40)
    bpe = ["--tokenizer", "bpe", "--vocab-size", "270"]
    prepare(["file", str(text), *bpe, "--out", str(corpus)])
    (corpus / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused(["--data", str(corpus), "--context-length", "16"])


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(
    markov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rosetrainer.training.step.accumulate_gradients", lambda *_: math.nan)
    with pytest.raises(ConfigError, match="the loss is nan at step 1; try a learning_rate below"):
        train_on_one(config_for(markov, tmp_path / "run"))


def train_on_one(config: TrainConfig) -> None:
    train(*check_config(config, 1))


def test_a_validation_loss_that_is_not_finite_saves_nothing(
    markov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ({"val/loss": math.nan}, "")
    monkeypatch.setattr("rosetrainer.training.trainer.evaluate", lambda *_: broken)
    with pytest.raises(ConfigError, match="the validation loss is nan at step 3; try a learning"):
        train_on_one(config_for(markov, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_gradient_that_is_not_finite_moves_no_weight(
    markov: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rosetrainer.training.trainer.clip_gradients", lambda *_: math.inf)
    with pytest.raises(
        ConfigError, match="step 1: the gradients' norm is inf; skipped 1, max_skipped=0"
    ):
        train_on_one(config_for(markov, tmp_path / "run"))


def test_the_seed_decides(markov: Path, tmp_path: Path) -> None:
    first = {}
    for seed in (1, 2):
        out = tmp_path / f"seed{seed}"
        train_on_one(config_for(markov, out, seed=seed, steps=1))
        first[seed] = read_log(out)[0]["train/loss"]
    assert first[1] != first[2]


def test_the_last_step_is_saved_whatever_checkpoint_every_says(
    markov: Path, tmp_path: Path
) -> None:
    """So that `generate` has what to load; weights are in no other form."""
    for every, steps in ((0, [5]), (2, [4, 5]), (9, [5])):
        out = tmp_path / f"every{every}"
        train_on_one(config_for(markov, out, steps=5, checkpoint_every=every))
        assert sorted(map(step_of, checkpoints(out))) == steps
        assert not list(out.glob("*.safetensors"))


def test_the_peak_is_that_of_all_ranks() -> None:
    assert run_ranks(2, sum_of_ranks) == [3.0, 3.0]


def sum_of_ranks() -> float:
    context = init_tensor_parallel()
    return sum_over_ranks(context.rank + 1.0, context)


def test_a_broken_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert refused([]) == "the environment's WORLD_SIZE='two' should be a number; use torchrun"


def test_the_log_keeps_small_figures_and_whole_counts() -> None:
    assert _rounded("train/loss", 1.23456789) == 1.234568
    assert _rounded("train/lr", 3.00000049e-9) == 3e-9
    assert _rounded("comm/bytes_per_step/tp_all_reduce", 123456789.0) == 123456789


def start(
    *command: str, cwd: Path = ROOT, code: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package that lies in `code`."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)} | (environment or {})
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_the_real_torchrun_trains(markov: Path, tmp_path: Path) -> None:
    done = start(
        *TORCHRUN, "-m", "rosetrainer", "train", "--data", str(markov), *SMALL, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks: tensor parallel 2 x data parallel 1" in done.stdout
    assert re.search(r"^dtype=auto is .* \(a block in bfloat16 takes .*; as kept in /", done.stdout)
    assert "step     2/2  val loss" in done.stdout
    assert "warning" not in done.stderr.lower()
    assert (tmp_path / "out" / "run-001" / "step_000002").exists()


def test_torchrun_reports_a_mistake_as_its_root_cause_without_a_traceback_of_ours(
    tmp_path: Path,
) -> None:
    done = start(*TORCHRUN, "-m", "rosetrainer", "train", "--n-heads", "3", cwd=tmp_path)
    assert done.returncode != 0
    _, _, cause = done.stderr.partition("Root Cause")
    assert [line for line in cause.splitlines() if "error: " in line] == [
        "  traceback : error: d_model=256 is not divisible by n_heads=3; "
        "n_heads can be 1, 2, 4, 8, 16, 32, 64, 128 or 256, or give d_head"
    ]
    assert "rosetrainer/config.py" not in done.stderr


def test_nproc_trains_and_generate_writes_the_same_at_any_tp_size(
    markov: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(markov), *SMALL, "--nproc", "2"]
    done = start("-m", "rosetrainer", "train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    texts = []
    for ranks in ([], ["--nproc", "2"]):
        done = start(
            "-m",
            "rosetrainer",
            "generate",
            "--prompt",
            "ab",
            "--tokens",
            "20",
            *ranks,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2 + 20 + 1


def test_the_command_line_exits_with_2_and_one_line(tmp_path: Path) -> None:
    for argv, expected in (
        (["train", "--tp-size", "2"], "-m rosetrainer train --nproc 2 --tp-size 2"),
        (["trian"], "unknown command trian; it can be train, generate, checkpoint, "),
        (["generate"], "no run with a checkpoint in out/; train one, or give --run DIR"),
    ):
        done = start("-m", "rosetrainer", *argv, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_one_rank_of_each_machine_tells_of_a_mistake() -> None:
    torchrun = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for local_rank, lines in (("0", 1), ("1", 0)):
        environment = torchrun | {"LOCAL_RANK": local_rank}
        command = ["-m", "rosetrainer", "train", "--data", "nowhere"]
        done = start(*command, environment=environment)
        assert done.returncode == 2
        assert done.stderr.count("\n") == lines


@pytest.mark.prints_commands
def test_the_tour_shows_its_stages_in_order(tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("python-docs", "__pycache__")
    for name in ("rosetrainer", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    tour = ["-m", "rosetrainer", "tour", "--steps", "2"]
    done = start(*tour, cwd=tmp_path, code=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = [line for line in done.stdout.splitlines() if "more text" in line]
    command = written.split("more text")[1].strip()
    python = command.split(" -m ")[0]
    in_order = (
        f"[2/5] data: {python} -m rosetrainer prepare python-docs",
        "[3/5] proof",
        "who holds what",
        "yes: what is left is rounding",
        "[4/5] training",
        "val loss",
        "[5/5] sample",
        "What next:",
    )
    found = [done.stdout.index(text) for text in in_order]
    assert found == sorted(found)
    again = subprocess.run(  # as a user does who copies it into a shell
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("If ")


def test_what_starts_ranks_imports_no_torch_and_a_rank_no_compiler(
    markov: Path, tmp_path: Path
) -> None:
    """Each costs as long as everything else before the first loss."""
    launcher = "import sys; import rosetrainer.commands.train; assert 'torch' not in sys.modules"
    own = ["--data", str(markov), "--out", str(tmp_path / "run"), *SMALL, "--n-heads", "2"]
    rank = (
        f"from rosetrainer.commands.train import main; main({own}); import sys; "
        "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    for program in (launcher, rank):
        done = start("-c", program)
        assert done.returncode == 0, done.stderr


def test_a_preset_is_changed_by_the_flags_beside_it() -> None:
    command = parse_command(["--steps", "7", "--preset", "speedrun", "--n-layers", "3"])
    speedrun = parse_command(["--preset", "speedrun"]).config
    assert (speedrun.model.tied, speedrun.optim.optimizer, speedrun.run.steps) == (
        False,
        "muon",
        150,
    )
    assert (command.config.run.steps, command.config.model.n_layers) == (7, 3)
    assert command.config.optim == speedrun.optim
    assert command.config.model == replace(speedrun.model, n_layers=3)
    assert parse_command([]).config == TrainConfig()
    with pytest.raises(ConfigError, match="preset"):
        parse_command(["--preset", "fastest"])
