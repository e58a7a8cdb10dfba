"""log.jsonl and TensorBoard tell the same, each step once, however often a run was broken off."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import time
import xml.etree.ElementTree
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from ranks import run_ranks
from runs import run_once, tiny

from rosetrainer.checkpoint.manifest import checkpoints
from rosetrainer.commands.prepare import main as prepare
from rosetrainer.config import GPTConfig, OptimConfig, RunConfig, TrainConfig
from rosetrainer.reporting.loss_curve import LossCurves, Scale, thinned
from rosetrainer.reporting.messages import changes, schedule_notes
from rosetrainer.reporting.run_log import EVENTS, LOG, RunLog, has_evaluation, read_log
from rosetrainer.training import trainer

Figures = dict[tuple[str, int], float]
TAGS = ("train/", "val/")


def in_the_log(folder: Path) -> Figures:
    """By tag and step; each may come once."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    told = [((tag, line["step"]), line[tag]) for line in lines for tag in line if "/" in tag]
    assert not [key for key, count in Counter(key for key, _ in told).items() if count > 1]
    return dict(told)


def in_tensorboard(folder: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    told = [
        ((tag, point.step), point.value)
        for tag in events.Tags()["scalars"]
        for point in events.Scalars(tag)
    ]
    assert not [key for key, count in Counter(key for key, _ in told).items() if count > 1]
    return dict(told)


def assert_told_alike(folder: Path) -> Figures:
    log = in_the_log(folder)
    assert in_tensorboard(folder) == pytest.approx(log, rel=1e-6)
    return log


def write_steps(log: RunLog, begin: int, end: int, steps: int, every: int) -> None:
    """What the loop tells of steps begin + 1 to end: each figure follows from its step."""
    for step in range(begin, end + 1):
        if step > begin:
            figures = {"train/loss": 5 + 1 / step, "train/lr": 1e-3 / step}
            log.step(step, {**figures, "train/grad_norm": step / 7, "perf/tokens_per_s": 9.0})
        elif step == 0 or has_evaluation(log._folder / LOG, step):
            continue
        if step % every == 0 or step == steps:
            log.evaluation(step, {"val/loss": 4 + 1 / step}, "")


@pytest.mark.parametrize("seed", range(12))
def test_after_any_breaks_each_step_is_told_once(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    every, saves, steps, reached = draw.choice([2, 3, 5]), draw.choice([1, 3]), 0, 0
    for _ in range(6):
        monkeypatch.setattr(time, "time", partial(float, draw.uniform(1e9, 2e9)))
        reached = draw.choice([reached, draw.randint(0, reached) // saves * saves])
        steps = max(steps, reached) + draw.randint(0, 7)
        end = draw.choice([steps, draw.randint(reached, steps)])
        log = RunLog(tmp_path, steps, reached)
        write_steps(log, reached, end, steps, every)
        if draw.random() < 0.5:
            log.__exit__()
            reached = end
        else:  # killed: what came after its last checkpoint may be told in part
            log._file.close()
            log._events.close()
            reached = end // saves * saves
            cut_some_bytes(tmp_path / LOG, reached, draw)
    log = RunLog(tmp_path, steps, reached)
    write_steps(log, reached, steps, steps, every)
    log.__exit__()
    told = assert_told_alike(tmp_path)
    assert {s for tag, s in told if tag == "train/loss"} == set(range(1, steps + 1))
    assert {s for tag, s in told if tag == "val/loss"} >= {*range(every, steps + 1, every), steps}
    for (tag, step), value in told.items():
        if tag.endswith("loss"):
            assert value == pytest.approx((5 if tag == "train/loss" else 4) + 1 / step, abs=1e-6)


def cut_some_bytes(path: Path, reached: int, draw: random.Random) -> None:
    """Of what the log tells of steps after the last checkpoint."""
    content = path.read_bytes()
    kept = 0
    for line in content.splitlines(keepends=True):
        if json.loads(line)["step"] <= reached:
            kept += len(line)
    path.write_bytes(content[: draw.randint(max(kept - 1, 0), len(content))])


TORN = {
    '{"step": 3, "train/lo': [1, 2],
    '{"step": 3, "train/loss": 1.5}': [1, 2, 3],
    "\0\0": [1, 2],
}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_does_not_join_the_next_one(torn: str, tmp_path: Path) -> None:
    whole = '{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": 2.0}\n'
    (tmp_path / LOG).write_text(whole + torn)
    with RunLog(tmp_path, 9, 3) as log:
        log.evaluation(4, {"val/loss": 2.25}, "")
    assert [step for _, step in assert_told_alike(tmp_path)] == [*TORN[torn], 4]


def test_of_checkpoints_only_a_slow_one_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, 9) as log:
        log.checkpoint(2, blocked=0.25, seconds=90.0)
        assert capsys.readouterr().out == ""
        log.checkpoint(4, blocked=12.0, seconds=12.5)
    assert capsys.readouterr().out.startswith(
        "step     4/9  training blocked for 12 s by a checkpoint; "
    )
    told = assert_told_alike(tmp_path)
    assert told["perf/checkpoint_blocked_s", 2] == 0.25 and told["perf/checkpoint_s", 4] == 12.5


def broken_resumed_and_extended(data: Path, out: Path) -> list[str]:
    """Killed, gone on with from an older checkpoint, finished, extended; then once more."""
    run_once(tiny(data, out), killed_in=5)
    with (out / LOG).open("a") as file:
        file.write('{"step": 5, "train/l')
    newest = checkpoints(out)[0] / "rank_00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    run_once(tiny(data, out))
    run_once(tiny(data, out, steps=7))
    run_once(tiny(data, out, steps=11), killed_in=9)
    run_once(tiny(data, out, steps=11))
    return [str(path) for path in out.glob(EVENTS)]


def test_a_run_that_was_broken_off_and_extended_tells_of_each_step_once(
    markov: Path, tmp_path: Path
) -> None:
    run_ranks(1, broken_resumed_and_extended, markov, tmp_path / "run")
    told = assert_told_alike(tmp_path / "run")
    assert {step for tag, step in told if tag == "train/loss"} == set(range(1, 12))
    assert {step for tag, step in told if tag == "val/loss"} == {3, 5, 6, 7, 9, 11}
    run_ranks(1, run_once, tiny(markov, tmp_path / "whole", steps=11))
    alone = in_the_log(tmp_path / "whole")
    # The learning rate follows from `steps`, so the parts before an extension differ.
    same = [(tag, step) for tag, step in told if step <= 2 and tag.startswith(TAGS)]
    assert {key: told[key] for key in same} == {key: alone[key] for key in same}
    curves = LossCurves.of(read_log(tmp_path / "run" / LOG))
    assert [step for step, _ in curves.train] == list(range(1, 12))
    picture = xml.etree.ElementTree.parse(tmp_path / "run" / "loss.svg").getroot()
    assert len(picture.findall("{*}circle")) == len(curves.val) == 6


def start_again(config: TrainConfig) -> tuple[int, str]:
    """How often a finished run that is started again evaluates, and what it says last."""
    run_once(config)
    out = config.run.out
    assert out
    before = {path: path.read_bytes() for path in (out / LOG, out / "config.json")}
    said = io.StringIO()
    with (
        mock.patch.object(trainer, "evaluate", wraps=trainer.evaluate) as evaluate,
        contextlib.redirect_stdout(said),
    ):
        run_once(config)
    assert {path: path.read_bytes() for path in before} == before
    return evaluate.call_count, said.getvalue().splitlines()[-1]


def test_a_finished_run_says_so_and_computes_nothing(markov: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = f"finished: 5 steps of 5 are in {out}; give more --steps to go on, or a new --out"
    assert run_ranks(1, start_again, tiny(markov, out)) == [(0, told)]


def test_bits_per_byte_are_the_nats_of_a_token_over_its_bytes(tmp_path: Path) -> None:
    text, corpus, run = tmp_path / "text", tmp_path / "corpus", tmp_path / "run"
    text.write_text("the rank that waits, and the rank that it waits for\n" * 40)
    prepare(["file", str(text), "--tokenizer", "bpe", "--vocab-size", "270", "--out", str(corpus)])
    run_ranks(1, run_once, tiny(corpus, run))
    told, meta = assert_told_alike(run), json.loads((corpus / "meta.json").read_text())
    assert meta["bytes_per_token"] > 1.5
    for step in (3, 5):
        bits = told["val/loss", step] / math.log(2) / meta["bytes_per_token"]
        assert told["val/bits_per_byte", step] == pytest.approx(bits, rel=1e-5)


def test_the_schedule_says_what_it_does() -> None:
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=2, min_lr_ratio=0.1)
    config = TrainConfig(optim=optim, run=RunConfig(steps=100))
    longer = config.with_settings(steps=300)
    reached = mock.Mock(step=100, config=config)
    assert schedule_notes(config, None) == []
    assert schedule_notes(longer, mock.Mock(step=100, config=longer)) == []
    assert schedule_notes(longer, reached) == [
        "the cosine schedule ends at step 300 now, not at 100: the learning rate was 1.00e-04 in "
        "step 100 and is 7.79e-04 in step 101"
    ]
    short = replace(config, optim=replace(optim, warmup_steps=101))
    assert schedule_notes(short, None) == [
        "warning: warmup_steps=101 is more than steps=100: the learning rate ends at 9.90e-04 and "
        "never reaches 1.00e-03; warmup_steps can be 0 to 100"
    ]
    assert not schedule_notes(replace(config, optim=replace(optim, warmup_steps=100)), None)


def test_what_differs_from_the_defaults_is_named() -> None:
    assert changes(TrainConfig()) == []
    config = TrainConfig(GPTConfig(d_model=64, vocab_size=9), run=RunConfig(steps=7, out=Path("x")))
    assert changes(config) == ["d_model=64", "steps=7"]


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_plot_fits_the_terminal_and_its_encoding(columns: int, encoding: str) -> None:
    curves = LossCurves([(step, 5 / step) for step in range(1, 3001)], [(500, 2), (3000, 1)])
    plot = curves.plot(columns, encoding)
    assert max(map(len, plot.splitlines())) <= columns
    plot.encode(encoding)
    assert "O" in plot or "●" in plot
    assert "train" in plot and "nats per token" in plot


def test_the_picture_shows_every_curve_with_axes_and_units() -> None:
    curves = LossCurves([(step, 1 + 5 / step) for step in range(1, 3001)], [(1500, 2.0), (3000, 1)])
    picture = xml.etree.ElementTree.fromstring(curves.svg())
    lines = {one.get("class"): str(one.get("points")) for one in picture.findall("{*}polyline")}
    assert {name: len(points.split()) for name, points in lines.items()} == {"train": 600, "val": 2}
    words = [one.text for one in picture.iter() if one.text]
    assert {"step", "loss (nats per token)", "training", "validation", "1,000", "2"} <= {*words}
    assert "prefers-color-scheme: dark" in curves.svg()
    far = LossCurves([(step, 1.0 + step) for step in (1, 2_500_000)]).svg()
    assert ">500,000<" in far and ">2,500,000<" in far
    for one, other in itertools.product([(1, 2.0), (1, 0.0)], [(2, 2.0), (2, 1e5)]):
        odd = LossCurves([one, other], [])  # a range of nothing, and a wide one
        assert odd.can_be_drawn and xml.etree.ElementTree.fromstring(odd.svg()) is not None
        assert odd.plot(80, "ascii")
    assert not LossCurves([(1, 2.0)], [(1, 2.5)]).can_be_drawn
    gone = [
        {"step": step, "train/loss": loss} for step, loss in ((1, 2.0), (2, math.nan), (3, 1.0))
    ]
    assert LossCurves.of(gone).train == [(1, 2.0), (3, 1.0)]


def test_ticks_are_round_numbers_within_the_range() -> None:
    assert Scale(0.9, 5.7, 0, 1).ticks() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert Scale(1, 1500, 0, 1).ticks() == [200, 400, 600, 800, 1000, 1200, 1400]
    assert thinned([(1, 1.0), (2, 3.0), (3, 8.0)], 2) == [(1.5, 2.0), (3, 8.0)]
