"""Every layout equals one process, and moves and holds what the closed forms say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lattice
import pytest
from once import Once

from rosetrainer.planner import layout as planner_layout
from rosetrainer.planner.layout import Plan, Work, plan

GRADIENTS_OVER_DP = [
    ("dp", "all_reduce", "backward"),
    *((axis, "reduce_scatter", "backward") for axis in ("dp", "shards")),
]
Results = dict[lattice.Layout, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def results(once: Once) -> Results:
    found: Results = once("lattice", lambda _: lattice.results())
    return found


@pytest.mark.parametrize("layout", lattice.layouts(), ids=str)
def test_a_layout_computes_what_one_process_does(layout: lattice.Layout, results: Results) -> None:
    """Logits, losses, norms, gradients; weights and Adam's moments after three updates."""
    for rank, found in enumerate(results[layout]):
        wrong = {what: e for what, e in found["errors"].items() if not lattice.is_equal(e)}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("layout", lattice.layouts(), ids=str)
def test_both_sides_are_alive_and_the_layout_is_active(
    layout: lattice.Layout, results: Results
) -> None:
    """Else equal nothings would agree: what one process finds, and each rank, moves."""
    sizes = dict(zip(("tp", "dp"), layout.ranks, strict=True))
    for found in results[layout]:
        assert bool(found["frozen"]) == bool(layout.frozen)
        for side in found["alive"]:
            assert min(side["norms"]) > lattice.CLIP, "clipping bites, in each step"
            assert min(abs(loss - math.log(layout.vocab_size)) for loss in side["losses"]) > 1e-4
            assert side["stood still"] == found["frozen"]
        for axis, size in sizes.items():
            moved = [
                (payload, phase)
                for (name, _, phase), (_, payload) in found["ledger"]
                if (name == axis or (axis, name) == ("dp", "shards"))
                and phase in ("forward", "backward")
            ]
            assert bool(moved) == (size > 1)
            assert all(payload > 0 for payload, _ in moved)
        sums = [calls for key, (calls, _) in found["ledger"] if key in GRADIENTS_OVER_DP]
        assert layout.ranks[1] == 1 or min(sums) >= (1 if layout.frozen else 3), "buckets"


def plan_of(layout: lattice.Layout, rank: int) -> Plan:
    rows = lattice.ROWS // layout.ranks[1] // layout.micro_batches
    has_source = layout.encoder_decoder or layout.model.architecture == "t5"
    source = lattice.S if has_source else 0
    work = Work(rows, lattice.T, layout.micro_batches, source, 8, 8)
    part = rank // layout.ranks[0] % (layout.ranks[1] // layout.zero[2])  # of ZeRO's shards
    return plan(layout.model, layout.parallel, work, part=part)


PLANNED = [one for one in lattice.layouts() if not one.frozen]


@pytest.mark.parametrize("layout", PLANNED, ids=str)
def test_the_ledger_and_the_memory_are_those_that_were_counted(
    layout: lattice.Layout, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_layout, "BUCKET_BYTES", lattice.BUCKET_BYTES)
    for rank, found in enumerate(results[layout]):
        predicted = plan_of(layout, rank)
        assert dict(found["ledger"]) == predicted.ledger
        held = {**found["held"], "activations": found["kept"]}
        assert held == predicted.memory


def test_every_pair_of_settings_is_met(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the table: the worst error of each layout, over all ranks and checks."""
    names = list(lattice.FACTORS)
    for first, second in itertools.combinations(names, 2):
        met = {(getattr(one, first), getattr(one, second)) for one in lattice.layouts()}
        assert met == set(itertools.product(lattice.FACTORS[first], lattice.FACTORS[second]))
    with capsys.disabled():
        print("\nworst difference / largest value, in float64, after three updates")
        for layout in lattice.layouts():
            ranks = [found["errors"] for found in results[layout]]
            worst = {what: max(errors[what] for errors in ranks) for what in ranks[0]}
            what = max(worst, key=lambda name: worst[name])
            print(f"  {worst[what]:.1e} {what:10} {layout}")
