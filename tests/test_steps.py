"""Each step's own tests, its training, its mistake, and what it shares with us.

On two ranks, forked from a process that has torch loaded; `make test-steps` runs the same scripts
on 1, 2 and 4 ranks through the real torchrun.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from ranks import LONGEST_SECONDS, RankFailure, run_ranks

STEPS = Path(__file__).resolve().parent.parent / "steps"
NAMES = sorted(path.name for path in STEPS.glob("[0-9][0-9]_*"))
WITH_RANKS = [name for name in NAMES if (STEPS / name / "comm.py").exists()]
TENSOR_PARALLEL = [name for name in WITH_RANKS if name > "05"]
SCRIPT = "test_forward_tp.py"
# 400 steps of training each; the last step's script has every check of theirs.
LONG = ("17_mixed_precision", "19_overlap")
SCRIPTS = [
    (name, script.name, 2 if name in WITH_RANKS else 1)
    for before, name in itertools.pairwise(NAMES)
    if name > "01" and name not in LONG  # step 00 is about torchrun itself
    for script in sorted((STEPS / name).glob("test_*.py"))
    # What a step took over unchanged is run where it came in; `make test-steps` runs all.
    if script.read_bytes() not in {one.read_bytes() for one in (STEPS / before).glob("test_*.py")}
]


def enter(folder: str) -> None:
    """Imports are the folder's from here on; the process is fresh and ends with the test."""
    os.chdir(folder)
    sys.path.insert(0, folder)


def run_script(folder: str, script: str, *flags: str) -> str:
    """What the script prints."""
    enter(folder)
    sys.argv = [script, *flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize("name, script, n_ranks", SCRIPTS)
def test_the_step_s_own_test_is_green(name: str, script: str, n_ranks: int) -> None:
    printed = run_ranks(n_ranks, run_script, str(STEPS / name), script)
    assert f"world_size: {n_ranks}\n" in printed[0]
    assert not any(printed[1:]), "rank 0 speaks for all"


def test_the_last_step_checks_what_the_long_ones_do() -> None:
    checks = {
        name: set(
            re.findall(r"^def (check_\w+)", (STEPS / name / SCRIPT).read_text(), re.MULTILINE)
        )
        for name in (*LONG, NAMES[-1])
    }
    assert all(checks[name] and checks[name] <= checks[NAMES[-1]] for name in LONG)


def losses(folder: str, steps: int, dtype: str, **sizes: int) -> tuple[list[float], float]:
    """(the loss of each step, for a corpus with a floor the validation loss too; the floor)"""
    enter(folder)
    train, config, context = (import_module(m) for m in ("train", "config", "parallel_context"))
    data, name = import_module("data"), Path(folder).name
    if name > "05":
        ranks = context.init_tensor_parallel()
    else:  # in step 04 the ranks of train.py are still data-parallel
        ranks = context.init_parallel(tp_size=1) if name > "04" else context.init_parallel()
    with contextlib.redirect_stderr(io.StringIO()):
        if not hasattr(data, "MarkovCorpus"):
            sizes["context_length"] = data.LONGEST + 1
            shape = config.GPTConfig(vocab_size=3 + data.LETTERS, **sizes)
            return train.train(shape, steps, ranks, getattr(torch, dtype))[1], 0.0
        corpus = data.MarkovCorpus()
        shape = config.GPTConfig(vocab_size=corpus.alphabet, **sizes)
        return train.train(shape, corpus, steps, ranks, getattr(torch, dtype)), corpus.floor


@pytest.mark.parametrize("name", WITH_RANKS)
def test_twenty_losses_agree_on_1_and_2_ranks_and_on_4_at_the_end(name: str) -> None:
    run = partial(losses, str(STEPS / name), 20, "float64", d_model=32, context_length=16)
    alone, _ = run_ranks(1, run)[0]
    for n_ranks in (2, 4) if name == WITH_RANKS[-1] else (2,):
        for found, _ in run_ranks(n_ranks, run):
            assert len(found) == len(alone)
            assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) <= 1e-8


def test_steps_05_to_09_are_one_function() -> None:
    names = [name for name in TENSOR_PARALLEL if name < "10"]
    curves = [run_ranks(1, losses, str(STEPS / name), 5, "float64")[0][0] for name in names]
    for curve in curves[1:]:
        assert max(abs(a - b) for a, b in zip(curve, curves[0], strict=True)) <= 1e-10


def test_a_short_training_ends_near_the_floor_and_not_under_it() -> None:
    """Of the last step; the others compute the same function."""
    found, floor = run_ranks(2, losses, str(STEPS / WITH_RANKS[-1]), 100, "float32")[0]
    assert abs(found[0] - torch.tensor(8.0).log().item()) < 0.1
    assert -0.01 < found[-1] - floor < 0.05


def reversal() -> float:
    enter(str(STEPS / "10_cross_attention"))
    train, config, context = (import_module(m) for m in ("train", "config", "parallel_context"))
    data = import_module("data")
    shape = config.GPTConfig(vocab_size=3 + data.LETTERS, context_length=data.LONGEST + 1)
    alone = context.ParallelContext()
    with contextlib.redirect_stderr(io.StringIO()):
        model, _ = train.train(shape, 250, alone)
    attention = [
        list(map(int, row.split())) for row in train.attention_map(model, alone).split("\n")
    ]
    size = len(attention)
    anti_diagonal = sum(attention[t][size - 1 - t] for t in range(size)) / size
    assert anti_diagonal > 3 * 9 / size, attention
    return train.exact_match(model, alone)


def test_step_10_learns_to_reverse_lines_that_it_has_never_seen() -> None:
    (share,) = run_ranks(1, reversal)
    assert share > 0.95


@pytest.mark.parametrize("name", WITH_RANKS)
def test_train_py_says_first_what_the_ranks_are(name: str) -> None:
    printed = run_ranks(2, run_script, str(STEPS / name), "train.py", "--steps", "2")
    kinds = "tensor-parallel( x 1 data-parallel)?" if name in TENSOR_PARALLEL else "data-parallel"
    assert re.match(f"2 {kinds} ranks: ", printed[0])
    assert printed[1] == ""


@pytest.mark.mutant
@pytest.mark.parametrize("name", [name for name in NAMES if name > "01"])
def test_the_known_mistake_turns_the_step_s_test_red(name: str, tmp_path: Path) -> None:
    for file in (STEPS / name).glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    patch = STEPS / name / "mistake.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    if name != LONG[0]:  # its 400 steps of training are not what another step's mistake is about
        script = tmp_path / SCRIPT
        if script.exists():
            script.write_text(script.read_text().replace("    check_short_products(context)\n", ""))
    red = ""
    before = NAMES[NAMES.index(name) - 1]
    older = {one.name: one.read_bytes() for one in (STEPS / before).glob("test_*.py")}

    def is_old(script: Path) -> bool:  # those come last: the mistake is one of the step's idea
        return older.get(script.name) == (STEPS / name / script.name).read_bytes()

    for script in sorted(sorted(tmp_path.glob("test_*.py")), key=is_old):
        try:
            run_ranks(2 if name in WITH_RANKS else 1, run_script, str(tmp_path), script.name)
        except RankFailure as failure:
            red = str(failure)
            break
    assert "AssertionError" in red


PIPELINES = [
    (name, schedule) for name in ("21_pipeline", "22_zero_bubble") for schedule in ("afab", "1f1b")
]
PIPELINES += [("22_zero_bubble", "zero-bubble"), (NAMES[-1], "1f1b")]


@pytest.mark.parametrize("name, schedule", PIPELINES)
def test_a_pipeline_trains_as_tensor_parallel_ranks_do(name: str, schedule: str) -> None:
    trains_as_tensor_parallel_ranks_do(name, ["--pp-size", "2", "--pp-schedule", schedule])


def test_shards_train_as_tensor_parallel_ranks_do() -> None:
    trains_as_tensor_parallel_ranks_do(NAMES[-1], ["--tp-size", "1", "--zero", "3"])


def trains_as_tensor_parallel_ranks_do(name: str, layout: list[str]) -> None:
    layouts: tuple[list[str], ...] = ([], layout)
    flags = ["--steps", "4", "--dtype", "float64", "--dropout", "0.1"]
    tp, pp = (
        run_ranks(2, run_script, str(STEPS / name), "train.py", *flags, *layout)[0]
        for layout in layouts
    )
    found = [[float(n) for n in re.findall(r"loss (\S+)[\n,]", text)] for text in (tp, pp)]
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], abs=2e-8)


def gpt_logits(folder: str, prefix: str, dtype: str) -> list[float]:
    """Logits of the step in the folder, or with a prefix of the package."""
    if not prefix:
        enter(folder)
    names = ("config", "model", "tensor_parallel", "parallel_context")
    if prefix:
        names = ("config", "models.gpt", "parallel.sharding", "parallel.context")
    config, model, sharding, context = (import_module(prefix + name) for name in names)
    shape = config.GPTConfig(  # a vocabulary that needs no pad, which step 09 has not
        vocab_size=128, context_length=24, n_layers=3, n_heads=4, d_model=64, tied=False
    )
    gpt = model.GPTModel(shape, context.init_tensor_parallel()).to(getattr(torch, dtype))
    sharding.init_weights(gpt, 3)
    ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 15:] = 0
    logits, _ = gpt(ids, mask)
    return logits[mask.bool()].flatten().tolist()


def test_step_09_is_the_package_bitwise_alone_and_to_1e_12_on_two_ranks() -> None:
    step = str(STEPS / "09_parallel_attention")
    for dtype in ("float32", "float64"):
        (ours,), (theirs,) = (
            run_ranks(1, gpt_logits, step, prefix, dtype) for prefix in ("", "rosetrainer.")
        )
        assert digest(ours) == digest(theirs)
    (alone,) = run_ranks(1, gpt_logits, step, "rosetrainer.", "float64")
    for found in run_ranks(2, gpt_logits, step, "", "float64"):
        assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) <= 1e-12


def digest(values: list[float]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    "flags", [["--stpes", "3"], ["--steps", "three"], ["--steps", "0"], ["--step", "3"]]
)
def test_a_wrong_flag_is_one_line(flags: list[str]) -> None:
    done = run(STEPS / "09_parallel_attention", "train.py", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def refusal(folder: str, rank: int, world_size: int) -> tuple[int, str]:
    """(exit status, stderr) of train.py on one of the ranks; no process group may start."""
    enter(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    sys.argv = ["train.py"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        runpy.run_path("train.py", run_name="__main__")
    assert not torch.distributed.is_initialized()
    return int(str(ended.value.code)), said.getvalue()


@pytest.mark.parametrize("name", WITH_RANKS)
def test_ranks_that_cannot_share_are_one_line_before_any_process_group(name: str) -> None:
    if name in TENSOR_PARALLEL:
        line, ranks = "n_heads=4 is not divisible by tp_size=8; tp_size can be 1, 2, 4", 8
    else:
        line, ranks = "16 rows cannot be shared evenly by 3 ranks; start 1, 2, 4, 8 or 16", 3
    folder = str(STEPS / name)
    assert run_ranks(1, refusal, folder, 0, ranks) == [(2, f"error: {line}\n")]
    assert run_ranks(1, refusal, folder, 1, ranks) == [(2, "")], "one rank speaks for all"


def test_dropout_is_refused_until_it_has_a_step() -> None:
    for name in ("01_minimal_gpt", "13_vocab_parallel_loss"):
        done = run(STEPS / name, "-c", "from config import *; GPTConfig(dropout=0.1).check()")
        assert "ConfigError: dropout=0.1 is not supported yet; dropout can be 0" in done.stderr


def test_a_step_that_needs_torchrun_says_so() -> None:
    done = run(STEPS / "00_two_ranks", "two_ranks.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: one process has nobody to talk to; start two: OMP_NUM")
    assert done.stderr.count("\n") == 1
