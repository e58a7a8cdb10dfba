"""Which of the layouts that Fast-LLM compares with one another are among those proven here.

Its list of 20 (ServiceNow/Fast-LLM, tests/utils/distributed_configs.py) names: dp data parallel, z
a stage of ZeRO, sdp data parallel in which ranks share a sequence, tp tensor parallel, stp with
sequence parallelism, pp pipeline with s layers a stage, df and bf micro-batches depth or breadth
first, ms parts of a sequence as micro-batches, ce the loss in parts.
"""

from __future__ import annotations

from collections.abc import Callable

import lattice
import pipelines
import pytest

NO_CONTEXT_PARALLEL = "ranks that share a sequence are context parallelism"
NO_ZERO = "these layouts hold every weight on each rank of dp"
NO_PARTS = "a micro-batch is of whole sequences"
MISSING = {
    "dp2_z2": NO_ZERO,
    "dp2_z3": NO_ZERO,
    "dp2_z2_df4": NO_ZERO,
    "sdp2": NO_CONTEXT_PARALLEL,
    "sdp2_stp2": NO_CONTEXT_PARALLEL,
    "sdp2_stp2_bf4": NO_CONTEXT_PARALLEL,
    "sdp2_stp2_pp2s2_ms4": NO_CONTEXT_PARALLEL,
    "pp2s2_ms4": NO_PARTS,
}
"""And why."""

FLAT: dict[str, Callable[[lattice.Layout], bool]] = {
    "dp2": lambda one: one.ranks == (1, 2),
    "tp2": lambda one: one.ranks == (2, 1) and not one.sequence_parallel,
    "stp2": lambda one: one.ranks == (2, 1) and one.sequence_parallel,
    "tp2_df4": lambda one: one.ranks == (2, 1) and one.micro_batches > 1,
    # The loss takes its rows in chunks in every layout.
    "stp2_ce4": lambda one: one.ranks == (2, 1) and one.sequence_parallel,
    "dp2_stp2": lambda one: one.ranks == (2, 2) and one.sequence_parallel,
}
BREADTH = ("afab", "interleaved")  # breadth first: all micro-batches forward, or in rounds

PIPELINED: dict[str, Callable[[pipelines.Layout], bool]] = {
    "pp2s2_bf4": lambda one: (one.tp, one.dp) == (1, 1) and one.schedule in BREADTH,
    "pp2s1_bf4": lambda one: (one.tp, one.dp, one.tied) == (1, 1, True),
    "dp2_pp2s2_bf4": lambda one: (one.tp, one.dp) == (1, 2) and one.schedule in BREADTH,
    "stp2_pp2s1_bf4": lambda one: (one.tp, one.dp, one.sequence_parallel) == (2, 1, True),
    "dp2_stp2_pp2s2_bf4": lambda one: (one.tp, one.dp, one.sequence_parallel) == (2, 2, True),
    "dp2_tp2_pp2s1_bf4": lambda one: (one.tp, one.dp, one.tied) == (2, 2, True),
}


@pytest.mark.parametrize("name", [*FLAT, *PIPELINED])
def test_their_layout_is_among_ours(name: str) -> None:
    if name in FLAT:
        assert any(map(FLAT[name], lattice.layouts()))
    else:
        ours = [*map(pipelines.layout_of, pipelines.rows()), *pipelines.EIGHT_RANKS]
        assert any(PIPELINED[name](one) for one in ours if one.pp == 2)


def test_each_of_their_twenty_is_among_ours_or_has_a_reason() -> None:
    assert len({*FLAT, *PIPELINED, *MISSING}) == len(FLAT) + len(PIPELINED) + len(MISSING) == 20
