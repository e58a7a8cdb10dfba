"""--timeline: each action of each rank once, in a trace, a picture and a table of the bubble."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from ranks import run_ranks
from runs import config_for, listened

from rosetrainer.config import TrainConfig
from rosetrainer.parallel.pipeline.schedule import make_schedule
from rosetrainer.parallel.pipeline.simulation import backward_takes_twice, simulate
from rosetrainer.reporting.profiler import WARM_UP
from rosetrainer.reporting.timeline import bubbles, check_timeline, measured, simulated, theory
from rosetrainer.training.setup import check_config
from rosetrainer.validation import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def config(markov: Path, tmp_path: Path, **settings: Any) -> TrainConfig:
    settings = {"timeline": tmp_path / "shown" / "t.json", "eval_every": 0} | settings
    return config_for(markov, tmp_path / "run", steps=WARM_UP + 2, **settings)


def test_each_action_of_each_rank_is_shown_once(markov: Path, tmp_path: Path) -> None:
    """Four ranks: two pipelines of two, whose schedule splits the backward pass."""
    layout = {"pp_size": 2, "dp_size": 2, "pp_schedule": "zero-bubble", "micro_batch_size": 1}
    said = tmp_path / "said"
    run_ranks(4, listened, config(markov, tmp_path, **layout), said)
    schedule = make_schedule("zero-bubble", 2, 1, 4)
    events = json.loads((tmp_path / "shown/t.json").read_text())["traceEvents"]
    for rank in range(4):
        shown = [one for one in events if one["pid"] == rank and one["ph"] == "X"]
        assert [
            (one["cat"], one["args"]["stage"], one["args"]["micro_batch"]) for one in shown
        ] == [tuple(action) for action in schedule.actions[rank // 2]]
        assert all(one["dur"] > 0 for one in shown)
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(shown))
        assert {
            one["args"]["name"] for one in events if one["pid"] == rank and one["ph"] == "M"
        } == {f"rank {rank}, pp rank {rank // 2}"}
    drawn = ElementTree.parse(tmp_path / "shown/t.svg")
    assert len(list(drawn.iter(f"{SVG}title"))) == 3 * 2 * 4 * 3
    told = said.read_text().splitlines()
    (line,) = [n for n, text in enumerate(told) if text.startswith("timeline of step 6 with zero")]
    assert told[line + 1].split() == ["bubble", "theory", "simulated", "measured"]
    assert told[line + 2].startswith("share of the step: of 1F1B (p-1)/(m+p-1) ")
    assert told[line + 3].startswith("ratio to the ideal: of 1F1B (p-1)/m ")
    assert told[line + 2].split()[-3] == "7.7%"  # p - 1 of 3 m + p - 1
    assert not any("no timeline" in text for text in told)


def test_a_run_that_ends_before_is_said_and_nothing_is_written(
    markov: Path, tmp_path: Path
) -> None:
    said, longer = tmp_path / "said", config(markov, tmp_path, pp_size=2, checkpoint_every=2)
    run_ranks(2, listened, longer.with_settings(steps=4, timeline=None), said)
    run_ranks(2, listened, longer, said)  # from step 4 on
    assert said.read_text().count("no timeline: training ended before its steps were recorded") == 1
    assert not (tmp_path / "shown").exists()


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 8)])
def test_equal_costs_give_the_closed_form(p: int, m: int) -> None:
    """Of notes in which every F takes 1 and every B 2, whatever was waited before them."""
    schedule = make_schedule("1f1b", p, 1, m)
    plan = simulate(schedule, backward_takes_twice)
    notes = [[(begin - 0.25, end, 0.25) for begin, end in own] for own in plan.times]
    runs = {
        "theory": theory(schedule, 3.0 * m),
        "simulated": simulated(schedule, notes),
        "measured": measured(notes),
    }
    for run in runs.values():
        assert run.length == pytest.approx(3 * (m + p - 1))
        assert run.bubble_share == pytest.approx((p - 1) / (m + p - 1))
        assert run.bubble_ratio == pytest.approx((p - 1) / m)
    _, shares, ratios = bubbles(runs)
    assert shares.split()[-3:] == [f"{(p - 1) / (m + p - 1):.1%}"] * 3
    assert ratios.split()[-3:] == [f"{(p - 1) / m:.1%}"] * 3


def test_a_slow_stage_is_in_the_simulation_and_not_in_theory() -> None:
    schedule = make_schedule("1f1b", 2, 1, 4)
    run = simulate(schedule, lambda action: 2.0 if action.stage else 1.0)
    found = simulated(schedule, [[(begin, end, 0.0) for begin, end in own] for own in run.times])
    assert found.times == run.times
    assert found.bubble_share > theory(schedule, run.busy).bubble_share + 0.05


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pp_size": 1}, "timeline={} is of a pipeline, and pp_size=1 is none; pp_size can be 2 or "
         "more, or use --profile"),
        ({"steps": 5}, "timeline={} shows step 6 and steps=5; steps must be at least 6"),
        ({"timeline": Path("t.svg")}, "timeline=t.svg should be a file whose name ends in .json"),
        ({"timeline": Path("/dev/null/t.json")}, "timeline=/dev/null/t.json cannot be written into "
         "/dev/null; choose another folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    markov: Path, tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    wrong = config(markov, tmp_path, pp_size=2).with_settings(**settings)
    with pytest.raises(ConfigError) as caught:
        check_config(wrong, wrong.parallel.pp_size)
    assert str(caught.value) == text.format(tmp_path / "shown/t.json")
    check_timeline(wrong.with_settings(timeline=None))
    assert not (tmp_path / "shown").exists()
