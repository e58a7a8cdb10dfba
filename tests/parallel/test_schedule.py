"""Schedules as data: each computes a step, and holds and takes what its paper says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import pipelining

from rosetrainer.config import GPTConfig
from rosetrainer.parallel.pipeline.schedule import Action, Schedule, make_schedule
from rosetrainer.parallel.pipeline.simulation import (
    ScheduleError,
    backward_takes_twice,
    check_schedule,
    simulate,
)
from rosetrainer.parallel_config import STAGES_PER_RANK, ParallelConfig
from rosetrainer.validation import ConfigError

RANKS, MICRO_BATCHES = (1, 2, 3, 4, 8), (1, 2, 3, 5, 8, 16, 17)
CASES = [
    (name, p, v)
    for name, (fewest, most) in STAGES_PER_RANK.items()
    for p in RANKS
    for v in ((2, 3, 4) if most > 2 else (fewest,))
]


def schedules(name: str, p: int, v: int) -> Iterator[Schedule]:
    """With each number of micro-batches that it can run."""
    for m in MICRO_BATCHES:
        if name != "interleaved" or m % p == 0:
            yield make_schedule(name, p, v, m)


def peak(name: str, rank: int, p: int, v: int, m: int) -> int:
    """Activations of micro-batches in a stage that the papers say a rank holds."""
    of_schedule = {
        "afab": m,
        "1f1b": min(p - rank, m),
        "interleaved": min(2 * (p - 1 - rank) + (v - 1) * p + 1, v * m),
        "zero-bubble": min(p, m),
        "zero-bubble-v": min(2 * p, 2 * m, m + 1 + rank),
    }
    return of_schedule[name]


@pytest.mark.parametrize(("name", "p", "v"), CASES)
def test_a_schedule_can_run_and_holds_what_its_paper_says(name: str, p: int, v: int) -> None:
    for schedule in schedules(name, p, v):
        m = schedule.micro_batches
        assert check_schedule(schedule) == [peak(name, rank, p, v, m) for rank in range(p)]
        count = p * v * m * (3 if schedule.splits_backward else 2)
        assert sum(map(len, schedule.actions)) == count


def test_a_message_takes_its_time_from_rank_to_rank_only() -> None:
    """One micro-batch meets nobody: there and back over p ranks are 2(p-1) messages."""
    for name, v in (("afab", 1), ("interleaved", 2), ("zero-bubble-v", 2)):
        for p in (1, 2, 3):
            if name == "interleaved" and p > 1:  # from the last rank to the first, and back
                messages = 2 * (p - 1) * v + 2 * (v - 1)
            else:  # the last rank of a V keeps what it has
                messages = 2 * (p - 1) * v
            schedule = make_schedule(name, p, v, p if name == "interleaved" else 1)
            path = {
                travel: simulate(schedule, backward_takes_twice, travel).times[0]
                for travel in (0.0, 100.0)
            }
            ends = {travel: max(end for _, end in times) for travel, times in path.items()}
            assert ends[100.0] - ends[0.0] == pytest.approx(100 * messages, abs=3 * p * v)


@pytest.mark.parametrize(("name", "p", "v"), CASES)
def test_a_step_takes_what_its_paper_says(name: str, p: int, v: int) -> None:
    """Where F, I and W take equally long: bubbles of 3(p-1), 3(p-1)/v, (p-1) and none."""
    for schedule in schedules(name, p, v):
        m, run = schedule.micro_batches, simulate(schedule, backward_takes_twice)
        assert run.busy == 3 * v * m
        if name in ("afab", "1f1b"):
            assert run.length == 3 * (m + p - 1)
            assert run.bubble_share == pytest.approx((p - 1) / (m + p - 1))
            assert run.bubble_ratio == pytest.approx((p - 1) / m)
        elif name == "interleaved":
            assert run.length == 3 * v * m + 3 * (p - 1)
        elif m >= 2 * p - 1:
            first, last = [times[0][0] for times in run.times], [t[-1][1] for t in run.times]
            if name == "zero-bubble":
                assert run.length == 3 * m + p - 1
            else:
                assert [b - a for a, b in zip(first, last, strict=True)] == [run.busy] * p


def test_messages_are_in_the_order_of_sending() -> None:
    schedule = make_schedule("1f1b", 2, 1, 3)
    assert schedule.messages == {
        (0, 1): [Action("F", 1, 0), Action("F", 1, 1), Action("F", 1, 2)],
        (1, 0): [Action("B", 0, 0), Action("B", 0, 1), Action("B", 0, 2)],
    }


@pytest.mark.parametrize(("name", "p", "v"), CASES)
def test_every_message_is_for_one_action_of_its_target(name: str, p: int, v: int) -> None:
    borders = 2 * (p - 1) if name == "zero-bubble-v" else (p * v - 1) * (p > 1)
    for schedule in schedules(name, p, v):
        fed = [
            (source, schedule.rank_of[action.stage], action)
            for source, actions in enumerate(schedule.actions)
            for action in filter(None, map(schedule.feeds, actions))
            if schedule.rank_of[action.stage] != source
        ]
        sent = [(*pair, one) for pair, many in schedule.messages.items() for one in many]
        assert sorted(fed) == sorted(sent)
        assert len(set(sent)) == len(sent) == 2 * schedule.micro_batches * borders


def damaged(schedule: Schedule, rank: int, change: Any) -> Schedule:
    actions = [list(one) for one in schedule.actions]
    change(actions[rank])
    return replace(schedule, actions=tuple(map(tuple, actions)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a.pop(), "rank 1 makes B of micro-batch 3 in stage 1 0 times and not 1"),
        (lambda a: a.append(a[0]), "rank 1 makes F of micro-batch 0 in stage 1 2 times and not 1"),
        (
            lambda a: a.append(Action("F", 0, 0)),
            "rank 1 makes F of micro-batch 0 in stage 0 1 times and not 0",
        ),
        (lambda a: a.reverse(), "rank 1 makes B of micro-batch 3 in stage 1 before its F"),
    ],
)
def test_a_list_that_does_not_compute_a_step_is_found(change: Any, text: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(damaged(make_schedule("1f1b", 2, 1, 4), 1, change))
    assert str(caught.value) == text


def test_ranks_that_would_wait_for_each_other_are_found() -> None:
    """The first stage wants a gradient before it has sent all that the last one waits for."""

    def ahead(actions: list[Action]) -> None:
        actions.insert(1, actions.pop(actions.index(Action("B", 0, 0))))

    def late(actions: list[Action]) -> None:
        actions.sort(key=lambda action: action.kind == "B")

    waiting = damaged(damaged(make_schedule("1f1b", 2, 1, 2), 0, ahead), 1, late)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(waiting)
    assert str(caught.value) == (
        "ranks wait for each other: B of micro-batch 0 in stage 0 waits for B of micro-batch 0 in "
        "stage 1; F of micro-batch 1 in stage 1 waits for F of micro-batch 1 in stage 0"
    )


NAMES = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def of_torch(kind: str, p: int, v: int, m: int, rank: int) -> list[Action]:
    """The actions of a rank by torch's own schedule, which wants stages that are told apart."""
    cls = pipelining.schedules.get_schedule_class(kind)
    stages = [
        SimpleNamespace(
            stage_index=rank + p * index,
            num_stages=p * v,
            group_size=p,
            group_rank=rank,
            group=None,
            has_backward=True,
            is_first=False,
            is_last=False,
            submod=None,
            stage_index_to_group_rank=None,
        )
        for index in range(v)
    ]
    made = cls(stages, m)
    order = made.pipeline_order[rank]
    return [
        Action(NAMES[one.computation_type.name], one.stage_index, one.microbatch_index)
        for one in order
        if one is not None
    ]


ORACLE = [
    ("Interleaved1F1B", "interleaved", 2, 2, 8),
    ("Interleaved1F1B", "interleaved", 4, 2, 8),
    ("Interleaved1F1B", "interleaved", 4, 3, 12),
    ("Interleaved1F1B", "1f1b", 1, 1, 5),
    ("InterleavedZeroBubble", "zero-bubble", 2, 1, 6),
    ("InterleavedZeroBubble", "zero-bubble", 4, 1, 8),
    ("InterleavedZeroBubble", "zero-bubble", 4, 1, 16),
    ("ZBVZeroBubble", "zero-bubble-v", 2, 2, 8),
    ("ZBVZeroBubble", "zero-bubble-v", 4, 2, 3),
    ("ZBVZeroBubble", "zero-bubble-v", 4, 2, 16),
]


@pytest.mark.parametrize("case", ORACLE, ids=str)
def test_the_order_is_that_of_torch_s_own_schedule(case: tuple[str, str, int, int, int]) -> None:
    kind, name, p, v, m = case
    ours = make_schedule(name, p, v, m)
    for rank in range(p):
        assert list(ours.actions[rank]) == of_torch(kind, p, v, m, rank)


@pytest.mark.parametrize(
    ("name", "p", "v", "m", "text"),
    [
        ("gpipe", 2, 1, 4, "pp_schedule=gpipe is none; it can be afab, 1f1b, interleaved, "
         "zero-bubble or zero-bubble-v"),
        ("1f1b", 2, 2, 4, "stages_per_rank=2 does not go with pp_schedule=1f1b; it can be 1"),
        ("zero-bubble-v", 2, 3, 4, "stages_per_rank=3 does not go with pp_schedule=zero-bubble-v; "
         "it can be 2"),
        ("interleaved", 2, 1, 4, "stages_per_rank=1 does not go with pp_schedule=interleaved; it "
         "can be 2 or more"),
        ("interleaved", 4, 2, 6, "pp_schedule=interleaved takes a multiple of pp_size=4 "
         "micro-batches, and global_batch_size / dp_size / micro_batch_size = 6; it can be 4 or 8"),
        ("interleaved", 4, 2, 3, "pp_schedule=interleaved takes a multiple of pp_size=4 "
         "micro-batches, and global_batch_size / dp_size / micro_batch_size = 3; it can be 4"),
    ],
)  # fmt: skip
def test_what_a_schedule_cannot_run_is_one_line_with_what_would_work(
    name: str, p: int, v: int, m: int, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_schedule(name, p, v, m)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("settings", "layers", "text"),
    [
        ({"pp_size": 4}, 3, "pp_size=4 x 1 stages of a rank are more than n_layers=3; their "
         "product can be 3 at most"),
        ({"pp_size": 2, "pp_schedule": "zero-bubble-v"}, 3, "pp_size=2 x 2 stages of a rank are "
         "more than n_layers=3; their product can be 3 at most"),
        ({"pp_schedule": "afab"}, 4, "pp_schedule=afab is for a pipeline, and pp_size=1 is none; "
         "pp_size can be 2 or more, or leave it out"),
        ({"stage_layers": "4"}, 4, "stage_layers=4 is for a pipeline, and pp_size=1 is none; "
         "pp_size can be 2 or more, or leave it out"),
        ({"pp_size": 2, "stage_layers": "3,x"}, 4, "stage_layers='3,x' should be a number of "
         "blocks for each stage, such as 3,4,3"),
        ({"pp_size": 2, "stage_layers": "3,2"}, 4, "stage_layers=3,2 are 5 blocks in 2 stages; "
         "they should be n_layers=4 in 2, each with one at least"),
        ({"pp_size": 2, "stage_layers": "4,0"}, 4, "stage_layers=4,0 are 4 blocks in 2 stages; "
         "they should be n_layers=4 in 2, each with one at least"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_divided_are_one_line(
    settings: dict[str, Any], layers: int, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**settings).check_pipeline(GPTConfig(n_layers=layers), 4)
    assert str(caught.value) == text


def test_what_a_pipeline_can_run_is_not_refused() -> None:
    ParallelConfig().check_pipeline(GPTConfig(n_layers=1), 1)
    ParallelConfig(pp_size=3).check_pipeline(GPTConfig(n_layers=3), 1)
    layers = ParallelConfig(pp_size=2, pp_schedule="interleaved", stage_layers="1,2,1,1")
    layers.check_pipeline(GPTConfig(n_layers=5), 2)
    assert layers.given_layers() == (1, 2, 1, 1)


def test_three_sizes_fit_the_world() -> None:
    assert ParallelConfig(pp_size=2).resolve(4) == (2, 1)
    assert ParallelConfig(pp_size=2, dp_size=2).resolve(8) == (2, 2)
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(pp_size=3).resolve(4)
    assert str(caught.value) == (
        "world size 4 is not tp_size x dp_size x pp_size = 1 x 1 x 3; start 3 ranks, or choose "
        "sizes whose product is 4"
    )
