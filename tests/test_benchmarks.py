"""The benchmarks compare equal work: each side's loss and gradients, and that they run at all."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpt2_names import rename
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import (
    bubbles,
    dtensor_step,
    families,
    growth,
    pipeline,
    pipelining_step,
    roofline,
    sharded,
    side_by_side,
    start_up,
    tensor_parallel,
    tokens_per_second,
)
from benchmarks.breakdown import Sum
from benchmarks.our_step import OurStep
from benchmarks.plain_step import HuggingFaceGPT2, PlainStep, plain_model
from benchmarks.side_by_side import Figures, Pairs, Rounds, Side
from benchmarks.work import Work, parse_work
from rosetrainer.checkpoint.huggingface import llama
from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.parallel.context import end_parallel, init_parallel, init_tensor_parallel
from rosetrainer.parallel.pipeline.schedule import make_schedule
from rosetrainer.parallel.pipeline.simulation import backward_takes_twice, simulate
from rosetrainer.parallel.sharding import gather_whole, load_whole
from rosetrainer.validation import ConfigError

HEAVY = pytest.mark.skipif(
    not os.environ.get("BENCH"), reason="make bench: it starts each side in a process of its own"
)
WORK = Work(GPTConfig(31, 10, 2, 4, 24), batch_size=3, steps=1, rounds=1)
FLAGS = [
    *("--n-layers", "1", "--d-model", "32", "--n-heads", "2", "--context-length", "16"),
    *("--rounds", "1", "--steps", "1"),
]
BLOCK_NAMES = {
    "norm_1": "attention_norm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "norm_2": "feed_forward_norm",
    "up": "feed_forward.dense_h_to_4h",
    "down": "feed_forward.dense_4h_to_h",
}


def our_names(plain: nn.Module) -> dict[str, Tensor]:
    """A PlainGPT's parameters by our names."""
    outer = {"tokens": "token_embedding", "positions": "position_embedding", "norm": "final_norm"}
    if "head.weight" in dict(plain.named_parameters()):  # untied
        outer["head"] = "output_head"
    ours = {}
    for name, parameter in plain.named_parameters():
        module, leaf = name.rsplit(".", 1)
        if module.startswith("blocks."):
            _, layer, inner = module.split(".")
            module = f"blocks.{layer}.{BLOCK_NAMES[inner]}"
        else:
            module = outer[module]
        ours[f"{module}.{leaf}"] = parameter.detach()
    return ours


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """No bias is zero, no norm is one."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def expect(step: tuple[float, float], other: tuple[float, float], tolerance: float) -> None:
    """Loss and norm of the gradients."""
    assert step == pytest.approx(other, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bf16 keeps 8 bits, and its roundings fall differently in either code.
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)],
)
def test_the_plain_side_computes_what_ours_does(dtype: torch.dtype, tolerance: float) -> None:
    plain = plain_model(WORK.model)
    disturb(plain)
    theirs, ours = PlainStep(WORK, dtype, plain), OurStep(WORK, dtype)
    load_whole(ours.model, our_names(plain))
    expect(ours(), theirs(), tolerance)


def test_hugging_face_s_side_computes_what_ours_does() -> None:
    """Its loss is in fp32 whatever its weights are."""
    model = HuggingFaceGPT2(WORK.model)
    disturb(model)
    theirs, ours = PlainStep(WORK, torch.float64, model), OurStep(WORK, torch.float64)
    load_whole(ours.model, rename(dict(model.theirs.named_parameters())))
    expect(ours(), theirs(), 1e-6)


def test_a_llama_of_the_library_computes_what_ours_does() -> None:
    """Its norms and its loss are in fp32 whatever its weights are."""
    model = replace(WORK.model, **families.LLAMA, n_kv_heads=2, d_ff=40)
    work = replace(WORK, model=model)
    side = families.HuggingFaceLlama(model)
    disturb(side)
    theirs, ours = PlainStep(work, torch.float64, side), OurStep(work, torch.float64)
    named = dict(side.theirs.named_parameters())
    sources = {name: llama.source_of(name, "llama").names for name in gather_whole(ours.model)}
    load_whole(
        ours.model,
        {name: torch.cat([named[one].detach() for one in ones]) for name, ones in sources.items()},
    )
    expect(ours(), theirs(), 1e-5)


def check_dtensor(fused: bool) -> None:
    context = init_tensor_parallel(device="cpu")
    plain = plain_model(WORK.model)
    disturb(plain)
    ours = OurStep(WORK, torch.float64, context)
    load_whole(ours.model, our_names(plain))
    mesh = init_device_mesh("cpu", (context.world_size,))
    theirs = dtensor_step.DTensorStep(WORK, torch.float64, plain, mesh, fused)
    expect(ours(), theirs(), 1e-10)
    one_process = plain_model(WORK.model)
    disturb(one_process)
    whole = PlainStep(WORK, torch.float64, one_process)
    whole()
    expect(theirs(), whole(), 1e-10)  # of updated weights


@pytest.mark.parametrize("fused", [False, True])
def test_dtensors_side_computes_what_ours_does(fused: bool) -> None:
    run_ranks(2, check_dtensor, fused)


def check_pipelining(folder: Path) -> None:
    """torch's schedules and ours compute alike; then both benchmarks, to their end."""
    model = replace(WORK.model, n_layers=4, tied=False, context_length=8)
    work = Work(model, batch_size=pipeline.MICRO_BATCHES, steps=1, rounds=1)
    context = init_parallel(ParallelConfig(pp_size=2), "cpu")
    ours = OurStep(work, torch.float64, context, pipeline.MICRO_BATCHES)
    plain = pipelining_step.untied(plain_model(model))
    disturb(plain)
    names = our_names(plain)
    load_whole(ours.model, {name: names[name] for name, _ in ours.model.named_parameters()})
    whole = PlainStep(work, torch.float64, deepcopy(plain))
    first, second = whole(), whole()
    expect(ours(), first, 1e-10)
    assert context.pp.group
    for schedule in pipelining_step.STAGES_OF_RANK:
        theirs = pipelining_step.PipeliningStep(
            work, torch.float64, deepcopy(plain), context.pp.group, schedule
        )
        expect(theirs(), first, 1e-10)
        expect(theirs(), second, 1e-10)  # of updated weights
    side_by_side.RESULTS = folder
    pipeline.compare(work, context)
    bubbles.compare(replace(work, batch_size=1), context)
    end_parallel()


def test_torch_s_pipelines_compute_what_ours_do_and_are_compared(tmp_path: Path) -> None:
    run_ranks(2, check_pipelining, tmp_path)
    kept = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    runs = {run["benchmark"]: run for run in kept}
    pipelines = {f"pipeline-p2-{what}" for what in ("time", "memory", "overhead")}
    assert set(runs) == pipelines | {"bubbles-p2-stages", "bubbles-p2-actions"}
    figures = runs["pipeline-p2-time"]["figures"]
    assert all(one["seconds"] > 0 for side in figures.values() for one in side)
    assert set(pipeline.OURS) | set(pipeline.TORCH) < set(figures)
    assert all(size > 0 for size in runs["pipeline-p2-memory"]["bytes"].values())
    found = runs["bubbles-p2-stages"]["figures"]
    for m in bubbles.MICRO_BATCHES:
        (ways,) = found[f"m {m}"]
        assert ways["theory"] == pytest.approx(1 / (m + 1))
        assert all(0 < ways[way] < 1 for way in bubbles.WAYS)


def test_a_step_s_operations_are_noted_with_what_they_compute_and_move() -> None:
    work = Work(GPTConfig(n_layers=2, d_model=32, n_heads=2, context_length=64), batch_size=2)
    step = OurStep(work, torch.float32)
    step()  # makes the optimizer's state
    calls = roofline.noted(step)
    assert [call.name for call in roofline.noted(step)] == [call.name for call in calls]
    products = sum(call.flops for call in calls if "attention" not in call.name)
    assert products == work.flops - 2 * work.tokens * 12 * 64 * 32  # attention's, of two layers
    x, mask = torch.ones(8, 4), torch.ones(1, 4).expand(8, 4)
    with roofline.Notes() as notes:
        x.view(4, 8).T.add_(1.0)
        (x * mask).sum()
    named = [(call.name, call.bytes) for call in notes.calls]
    with roofline.Notes() as notes:
        torch.ones(2, 3, 4).baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 4))
    assert notes.calls[-1].flops == 2 * 2 * 3 * 5 * 4
    assert named == [("view", 0), ("permute", 0), ("add_", 256), ("mul", 272), ("sum", 132)]
    limits = roofline.Limits(1e3, {100: 10.0, 10_000: 5.0})
    assert limits.seconds(roofline.Call("", 0.0, 4000, 100)) == 10.0
    assert limits.seconds(roofline.Call("", 0.0, 9000, 50)) == 9.0
    rows = roofline.rows_of([calls, calls, calls], limits)
    assert sum(row.calls for row in rows.values()) == len(calls)
    assert sum(row.limit for row in rows.values()) == pytest.approx(sum(map(limits.seconds, calls)))


def test_what_is_doubled_grows_by_its_closed_form() -> None:
    base = replace(WORK, model=replace(WORK.model, vocab_size=256))
    works, alone = growth.doubled(base), ParallelConfig(1, 1)
    planned = {n: growth.planned_peak(one, alone, torch.float32) for n, one in works.items()}
    assert works["batch"].flops == 2 * base.flops
    for name in set(works) - {growth.BASE}:
        assert 1 < works[name].flops / base.flops < 4
        assert 1 < planned[name] / planned[growth.BASE] < 4


def check_sharded() -> None:
    """Each of torch's ways, and ours at each level, computes what one process does."""
    work = Work(replace(WORK.model, n_layers=2), batch_size=4, steps=1, rounds=1)
    context = init_parallel(ParallelConfig(dp_size=2), "cpu")
    whole = PlainStep(work, torch.float64, plain_model(work.model))
    first, second = whole(), whole()
    for name in sharded.THEIRS:
        theirs = sharded.builders(work, torch.float64, context)[name]()
        expect(theirs(), first, 1e-10)
        expect(theirs(), second, 1e-10)  # of updated weights
    plain = {name: tensor.double() for name, tensor in our_names(plain_model(work.model)).items()}
    for name in sharded.OURS:
        ours: Any = sharded.builders(work, torch.float64, context)[name]()
        load_whole(ours.model, plain)
        expect(ours(), first, 1e-10)
    end_parallel()


def test_torch_s_ways_to_share_a_batch_compute_what_ours_do() -> None:
    run_ranks(2, check_sharded)


def test_the_time_of_a_message_is_that_of_those_that_were_waited_for() -> None:
    """The second rank waits for each result, and begins a quarter after its end."""
    schedule = make_schedule("1f1b", 2, 1, 2)
    run = simulate(schedule, backward_takes_twice, travel=0.25)
    waits = [[0.0] + [b - a for (_, a), (b, _) in pairwise(times)] for times in run.times]
    waits[1][0] = run.times[1][0][0]
    times = [
        [(begin - wait, end, wait) for (begin, end), wait in zip(own, waited, strict=True)]
        for own, waited in zip(run.times, waits, strict=True)
    ]
    assert bubbles.message_seconds(schedule, times) == 0.25
    shares = bubbles.shares(schedule, times)
    assert [shares[way] for way in bubbles.WAYS] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, run.bubble_share, run.bubble_share]
    )


def check_control() -> None:
    dtensor_step.heads_together = lambda qkv, ranks: None
    check_dtensor(fused=False)


def test_control_heads_cut_as_they_come_are_seen() -> None:
    with pytest.raises(AssertionError, match="in expect"):
        run_ranks(2, check_control)


def test_a_sum_that_computing_covers_is_no_communication() -> None:
    kind = ((2, 3), torch.float32)
    assert Sum(kind, None, 0.0, meanwhile=0.0, waited=0.5).communication(alone=0.2) == 0.2
    assert Sum(kind, None, 0.0, meanwhile=0.0, waited=0.1).communication(alone=0.2) == 0.1
    assert Sum(kind, None, 0.0, meanwhile=0.3, waited=0.5).communication(alone=0.2) == 0.0
    assert Sum(kind, None, 0.0, meanwhile=0.25, waited=0.5).communication(alone=0.5) == 0.25


def rounds_here(sides: Sequence[Side], rounds: int, pairs: Pairs) -> Rounds:
    """in_turn of tensor_parallel without a new process for each side; ranks are forked."""
    found: Rounds = {}
    for side in sides:
        _, _, name, *flags = side.arguments
        work = tensor_parallel.parse(flags)
        if name in tensor_parallel.PARALLEL:
            ranks = tensor_parallel.ranks_of(name)
            found[side.name] = run_ranks(ranks, tensor_parallel.one_round, name, work)[:1]
        else:
            found[side.name] = [tensor_parallel.one_round(name, work)]
    return found


class Timed:
    """A side whose rounds take no time but by the clock that is put in its place."""

    def __init__(self, name: str, seconds: float, clock: list[float], stops_at: int = 99) -> None:
        self.name, self.seconds, self.clock, self.left = name, seconds, clock, stops_at

    def run(self) -> Figures:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGTERM)
        self.clock[0] += self.seconds
        return {"seconds": self.seconds}


@pytest.mark.parametrize(
    ("rounds", "longest", "stops_at", "whole", "last"),
    [
        (3, 600, 99, 3, "round 3 of 3, ours 4.000, done"),
        (9, 600, 99, 6, "no more of the 9: 600 s are the most"),
        (3, math.inf, 99, 3, "round 3 of 3, ours 4.000, done"),
        (1, 5, 99, 1, "round 1 of 1, ours 4.000, done"),  # one is measured, however long
        (9, 600, 2, 2, "stopped after 2 of 9 rounds"),
    ],
)
def test_a_comparison_shows_its_rounds_and_ends(
    rounds: int,
    longest: float,
    stops_at: int,
    whole: int,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [0.0]
    monkeypatch.setattr(side_by_side, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    sides = [Timed("plain", 80, clock, stops_at), Timed("own", 20, clock)]
    before = signal.getsignal(signal.SIGTERM)
    found = side_by_side.in_turn(sides, rounds, {"ours": ("plain", "own")}, longest)
    assert {name: len(figures) for name, figures in found.items()} == {"plain": whole, "own": whole}
    told = capsys.readouterr().err.splitlines()
    if rounds > 1:
        count = min(rounds, 6)
        left = f"{100 * (count - 1)} s to go; Ctrl-C keeps what is there"
        assert told[0] == f"round 1 of {count}, ours 4.000, {left}"
    assert told[-1] == last
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_comparison_that_is_stopped_in_its_first_round_has_nothing() -> None:
    clock = [0.0]
    with pytest.raises(KeyboardInterrupt):
        side_by_side.in_turn([Timed("plain", 1, clock), Timed("own", 1, clock, 0)], 3, {})


ANSWERS = """
from itertools import count
from benchmarks.side_by_side import answer
numbers = count({first})
answer(lambda: {{"number": next(numbers), "of two": 1 / (next(numbers) < {last})}})
"""


def test_a_process_that_stays_answers_each_round(capfd: pytest.CaptureFixture[str]) -> None:
    scripts = {"a": ANSWERS.format(first=1, last=99), "b": ANSWERS.format(first=5, last=9)}
    with side_by_side.staying([Side(name, ["-c", text]) for name, text in scripts.items()]) as two:
        found = side_by_side.in_turn(two, 2, {})
        assert side_by_side.median(found, "a", "number") == 2  # 1 and 3
        assert side_by_side.median(found, "b", "number") == 6  # 5 and 7
        with pytest.raises(SystemExit, match="error: b: status 1"):
            two[1].run()
        with pytest.raises(SystemExit, match="error: b: status 1"):
            two[1].run()
    assert all(side.process.poll() is not None for side in two)
    assert "ZeroDivisionError" in capfd.readouterr().err


def check_kept(folder: Path, shown: str, benchmarks: set[str]) -> None:
    """That each has its JSON and its line."""
    runs = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert {run["benchmark"] for run in runs} == benchmarks
    for run in runs:
        assert f"{run['benchmark']}: ratio" in shown
        assert run["ratio"] > 0
        assert run["machine"]["torch"] == torch.__version__


@HEAVY
def test_tokens_per_second_shows_each_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    monkeypatch.setattr(tokens_per_second, "has_native_bf16", lambda device: True)
    tokens_per_second.main(FLAGS)
    shown = capsys.readouterr().out
    for name in tokens_per_second.SIDES:
        (line,) = [line for line in shown.splitlines() if f"  {name} " in line]
        assert "tokens/s" in line
        assert line.endswith("of the peak")
    check_kept(tmp_path, shown, {"tokens-per-second-bf16", "tokens-per-second-fp32"})


def test_a_side_that_this_machine_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokens_per_second, "has_native_bf16", lambda device: False)
    monkeypatch.setattr(tokens_per_second, "find_spec", lambda name: None)
    sides = tokens_per_second.sides_here()
    assert list(sides) == [tokens_per_second.OURS_FP32]
    tokens_per_second.name_missing(sides)
    shown = capsys.readouterr().out
    assert "no native bf16" in shown
    assert "no transformers" in shown


@HEAVY
def test_tensor_parallel_shows_each_side_and_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    monkeypatch.setattr(tensor_parallel, "in_turn", rounds_here)
    tensor_parallel.main([*FLAGS, "--n-heads", "4", "--dtype", "float32"])
    shown = capsys.readouterr().out
    names = ("dtensor", "one-process", "four-ranks")
    check_kept(tmp_path, shown, {f"tensor-parallel-{name}" for name in names})
    run = json.loads(next(tmp_path.iterdir()).read_text())
    (figures,) = run["figures"][tensor_parallel.OURS]
    parts = figures["parts"]
    spent = parts["matmul"] + parts["other compute"]
    spent += parts["communication"] + parts["waiting for the other rank"]
    assert spent == pytest.approx(parts["all"])
    assert parts["sums, alone"] > 0
    assert "without communication" in shown


@HEAVY
def test_start_up_times_the_command_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    start_up.main(["--rounds", "1"])
    shown = capsys.readouterr().out
    check_kept(tmp_path, shown, {"start-up-2-ranks", "start-up-one-process"})
    for mark in start_up.MARKS:
        assert shown.count(f"to the {mark} ") == 2


def test_a_shape_that_another_side_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="the other sides have 0.0"):
        parse_work(["--dropout", "0.1"], "tokens_per_second")
