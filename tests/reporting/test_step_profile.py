"""--profile: a trace for a browser for each rank, a table on rank 0, and nothing without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from runs import config_for, listened

from rosetrainer.config import ParallelConfig
from rosetrainer.reporting.profiler import ROWS, WARM_UP, check_profile
from rosetrainer.validation import ConfigError


def test_each_rank_writes_its_trace_and_rank_0_prints_the_table(
    markov: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    config = config_for(markov, out, steps=WARM_UP + 3, profile=2, eval_every=0)
    config = replace(config, parallel=ParallelConfig(dp_size=2))
    run_ranks(2, listened, config, said)
    for rank in range(2):
        trace = json.loads((out / f"trace_rank_{rank:05}.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert any(name.startswith("aten::") for name in names)
        steps = {name for name in names if name.startswith("ProfilerStep#")}
        assert steps == {f"ProfilerStep#{WARM_UP}", f"ProfilerStep#{WARM_UP + 1}"}
    _, told = said.read_text().split("profile of 2 steps: ")
    where, title, *rows = told.splitlines()[: ROWS + 2]
    assert where.startswith(
        f"{out}/trace_rank_00000.json, one for each rank; open it at https://ui"
    )
    assert title.split() == ["own", "time", "on", "the", "CPU", "ms", "a", "step", "share", "calls"]
    assert all(len(row) <= 100 for row in [title, *rows])
    times = [float(row.split()[-3]) for row in rows]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert 0 < sum(float(row.split()[-2].rstrip("%")) for row in rows) <= 100.5
    assert any(row.startswith("aten::") for row in rows)


def test_a_profile_that_does_not_come_to_its_end_is_said(markov: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    config = config_for(markov, out, steps=WARM_UP + 2, eval_every=0, checkpoint_every=2)
    run_ranks(1, listened, config.with_settings(steps=4), said)
    profiled = config.with_settings(profile=2)  # goes on from step 4: three are left
    run_ranks(1, listened, profiled, said)
    assert said.read_text().count("no profile: training ended before its steps were recorded") == 1
    assert not list(out.glob("trace*"))


@pytest.mark.parametrize(
    ("profile", "steps", "offered"),
    [(3, 7, "profile can be at most 2, or steps at least 8"), (1, 5, "steps must be at least 6")],
)
def test_a_run_too_short_for_its_profile_is_refused(profile: int, steps: int, offered: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_profile(profile, steps)
    assert str(caught.value).endswith(f" begins after 5 steps and steps={steps}; {offered}")
    check_profile(profile, WARM_UP + profile)
    check_profile(0, 1)
