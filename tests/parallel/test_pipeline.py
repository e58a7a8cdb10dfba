"""Pipelined layouts compute what one process does, with every schedule."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pipelines
import pytest
from once import Once
from oracle import TOLERANCE, random_batch
from pipelines import Layout
from ranks import run_ranks
from torch import nn

from rosetrainer.config import GPTConfig, ParallelConfig
from rosetrainer.model_flops import flops_of_block, flops_of_head
from rosetrainer.models.build import build_model
from rosetrainer.parallel.context import init_parallel
from rosetrainer.parallel.pipeline import runner
from rosetrainer.parallel.pipeline.schedule import make_schedule
from rosetrainer.parallel.pipeline.stage import layers_of_stages, spread_layers
from rosetrainer.parallel.sharding import init_weights
from rosetrainer.planner.layout import Work, plan
from rosetrainer.training.step import compute_gradients

Results = dict[Layout, list[dict[str, Any]]]
# Those that a mutant of tests/mutants/ breaks run by themselves, the others together.
SINGLE = {
    "afab": Layout(2, "afab", 3),
    "1f1b": Layout(3, "1f1b", 8, 7, stage_layers="3,1,3", recompute="block"),
    "interleaved": Layout(2, "interleaved", 8, stages_per_rank=2, dropout=0.1),
    "zero-bubble": Layout(3, "zero-bubble", 5, 5, dropout=0.1),
    "zero-bubble-v": Layout(2, "zero-bubble-v", 3, tied=False),
}
FEW_MICRO_BATCHES = [Layout(2, "1f1b", 1, dropout=0.1), Layout(3, "1f1b", 2)]
LAYOUTS = [*map(pipelines.layout_of, pipelines.rows()), *pipelines.EIGHT_RANKS, *FEW_MICRO_BATCHES]


@pytest.fixture(scope="session")
def results(once: Once) -> Results:
    found: Results = once("pipelines", lambda _: pipelines.results(LAYOUTS))
    return found


@pytest.mark.parametrize("name", SINGLE)
def test_a_schedule_computes_what_one_process_does(name: str) -> None:
    layout = SINGLE[name]
    found = pipelines.results([layout])[layout]
    check_results(layout, found)
    check_copies(layout, found)
    check_ledger(layout, found)


def test_level_1_of_zero_computes_what_one_process_does() -> None:
    """Of three stages the one in the middle has blocks alone; the tied table is on both ends."""
    layout = Layout(3, "zero-bubble", 5, 5, dp=2, dropout=0.1, zero=1)
    found = pipelines.results([layout])[layout]
    check_results(layout, found)
    check_copies(layout, found)
    check_ledger(layout, found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_pipeline_computes_what_one_process_does(layout: Layout, results: Results) -> None:
    check_results(layout, results[layout])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_several_ranks_hold_is_bitwise_alike(layout: Layout, results: Results) -> None:
    check_copies(layout, results[layout])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_ledger_counts_every_message(layout: Layout, results: Results) -> None:
    check_ledger(layout, results[layout])


def test_every_pair_of_settings_that_can_run_is_met() -> None:
    every = itertools.product(*pipelines.FACTORS.values())
    assert pairs(pipelines.rows()) == pairs(row for row in every if pipelines.can_run(row))


def pairs(rows: Iterable[tuple[Any, ...]]) -> set[Any]:
    return set().union(*(itertools.combinations(enumerate(row), 2) for row in rows))


def check_results(layout: Layout, found: list[dict[str, Any]]) -> None:
    """Logits, losses, norms, gradients; weights after a clipped SGD step and three of AdamW."""
    every = set(pipelines.whole_weights(layout.model))
    for rank, one in enumerate(found):
        wrong = {what: e for what, e in one["errors"].items() if not e <= TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"
        assert not one["stood still"]
        assert all(norm > pipelines.CLIP for norm in one["norms"])  # so that clipping bites
        assert abs(one["losses"][0] - math.log(139)) > 0.1
    assert set().union(*(one["checksums"] for one in found)) == every
    heads = layout.dp * layout.tp
    assert sum("logits" in one["errors"] for one in found) == heads
    assert sum(one["has hidden"] for one in found) == heads


def check_copies(layout: Layout, found: list[dict[str, Any]]) -> None:
    """A tied table on both ends, and everything over dp."""
    holders, tp = [one["checksums"] for one in found], layout.tp
    for rank, own in enumerate(holders):
        for other in holders[rank % tp :: tp]:
            assert {n: own[n] for n in own if n in other} == {
                n: other[n] for n in other if n in own
            }
    table = sum("token_embedding.weight" in own for own in holders)
    ends = 2 if layout.tied and layout.schedule != "zero-bubble-v" else 1
    assert table == ends * layout.dp * tp


def check_ledger(layout: Layout, found: list[dict[str, Any]]) -> None:
    """Sends and receives as the schedule has them, the tied table's gradient; all as planned."""
    schedule = make_schedule(
        layout.schedule, layout.pp, layout.parallel.stages_of_rank, layout.micro_batches
    )
    tokens = pipelines.T // (layout.tp if layout.sequence_parallel else 1)
    message = pipelines.ROWS_EACH * tokens * layout.model.d_model * 8
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    table = 256 // layout.tp * layout.model.d_model * 8  # rows of the vocabulary with its pad
    for rank, one in enumerate(found):
        own = rank // (layout.dp * layout.tp)
        ledger = {key[1:]: counted for key, counted in one["ledger"] if key[0] == "pp"}
        for operation, place in (("send", 0), ("receive", 1)):
            pairs = [(pair[place], many) for pair, many in schedule.messages.items()]
            mine = [action for rank_of, many in pairs if rank_of == own for action in many]
            for phase in ("forward", "backward"):
                calls = sum((action.kind == "F") == (phase == "forward") for action in mine)
                size = calls * message
                tied_ends = layout.tied and first != last and own in (first, last)
                if phase == "backward" and tied_ends:
                    calls, size = calls + 1, size + table
                assert ledger.get((operation, phase), (0, 0)) == (calls, size)
        assert sum(size for (_, phase), (_, size) in ledger.items() if phase == "forward") > 0
        work = Work(pipelines.ROWS_EACH, pipelines.T, layout.micro_batches, 0, 8, 8)
        if layout.kv_heads is None or not schedule.splits_backward:  # else plan has no form
            assert dict(one["ledger"]) == plan(layout.model, layout.parallel, work, own).ledger


def being_sent() -> list[int]:
    """In a step of 1F1B, how many messages this rank still holds for sending after each B."""
    layout, found = Layout(3, layers=3), list[int]()
    context = init_parallel(layout.parallel)
    model = build_model(layout.model, context)
    init_weights(model, 5)
    backward = runner._Run.backward

    def counted(run: Any, action: Any) -> None:
        backward(run, action)
        found.append(sum(map(len, run.sent.values())))

    rows = [random_batch(layout.model, 1, seed) for seed in range(layout.micro_batches)]
    with patch.object(runner._Run, "backward", counted):
        compute_gradients(model, [(n, *pair) for n, pair in enumerate(rows)], context)
    return found


def test_what_another_stage_has_is_not_kept_for_sending() -> None:
    """With what comes from it, it is known that all that it had used before has come: of five
    activations all but the newest, of five gradients all but those since the newest activation.
    """
    first, second, last = run_ranks(3, being_sent)
    assert first == [1, 1, 1, 0, 0]  # activations
    assert second == [2, 3, 3, 3, 3]  # of each
    assert last == [1, 2, 2, 2, 2]  # gradients


def initial_weights() -> dict[str, str]:
    context = init_parallel(ParallelConfig(pp_size=3, pp_schedule="interleaved"))
    model = build_model(Layout(3, layers=7).model, context)
    init_weights(model, 5)
    return hashes(model)


def hashes(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


def test_initial_weights_are_those_of_one_process() -> None:
    """By name, and no two layers begin alike; only the tied table lies on two ranks."""
    alone = build_model(Layout(1, layers=7).model)
    init_weights(alone, 5)
    expected = hashes(alone)
    found = run_ranks(3, initial_weights)
    for own in found:
        assert own == {name: expected.get(name) for name in own}
    assert set().union(*found) == set(expected)
    assert sum(map(len, found)) == len(expected) + 1
    drawn = [expected[name] for name in expected if name.endswith(("h.weight", "value.weight"))]
    assert len(drawn) == len(set(drawn)) == 3 * 7


def test_layers_are_spread_by_what_they_cost() -> None:
    """A head that costs as much as two blocks: 1 block and the head with 3 of the others."""
    config = GPTConfig(vocab_size=16, n_layers=7, d_model=64, n_heads=4, context_length=16)
    assert flops_of_head(config) < flops_of_block(config) / 2
    assert spread_layers(config, 3) == (2, 3, 2)
    rows = -(-2 * flops_of_block(config) // (6 * config.d_model))
    wide = GPTConfig(vocab_size=rows, n_layers=7, d_model=64, n_heads=4, context_length=16)
    assert spread_layers(wide, 3) == (3, 3, 1)
    parallel = ParallelConfig(pp_size=3)
    assert layers_of_stages(wide, parallel) == [range(3), range(3, 6), range(6, 7)]
    given = ParallelConfig(pp_size=3, stage_layers="1,2,4")
    assert layers_of_stages(wide, given) == [range(1), range(1, 3), range(3, 7)]
